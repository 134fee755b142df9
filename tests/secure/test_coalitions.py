"""Who can decrypt: the printed statement, and every coalition against it, with its real shares."""

import functools
import itertools
import re

import numpy as np
import pytest

from fedjax_llm.errors import Refused
from fedjax_llm.secure import shamir
from fedjax_llm.secure.bfv import open_bfv
from fedjax_llm.secure.decryption import Statement, Total
from fedjax_llm.secure.joint_key import check_confirmations
from fedjax_llm.secure.keyholders import KeyHolders
from fedjax_llm.secure.parameters import choose
from fedjax_llm.secure.residues import add, pack
from fedjax_llm.secure.sums import BadMessage, BelowThreshold, Costs

GROUPS = {"2 of 2": 2, "2 of 3": 2, "3 of 4": 3, "3 of 5": 3, "5 of 5": 5}
NAMES = ("aws", "gcp", "azure", "own", "lab")
CLIENTS = ("x", "y", "z")


@pytest.fixture(scope="session")
def scheme():
    return open_bfv(choose(2**10, 4, 5, count=1000))


@pytest.fixture(scope="session", params=GROUPS)
def holders(request, scheme):
    clouds = NAMES[: int(request.param[-1])]
    return KeyHolders(scheme, clouds, GROUPS[request.param])


@pytest.fixture(scope="session")
def slots(scheme):
    values = np.random.default_rng(6).integers(-(2**10), 2**10, (3, scheme.ring_dimension))
    values[:, 0] = 1
    return values


@pytest.fixture
def summed(scheme, slots):
    """The sum of three fresh ciphertexts under the present key."""

    def make(holders):
        key = scheme.public_key(holders.key.residues_2LN)
        sent = [scheme.encrypt(key, row) for row in slots]
        return functools.reduce(lambda x, y: add(x, y, scheme.moduli), sent)

    return make


def next_round(holders):
    return 1 + max(party._journal.round_number for party in holders.parties.values())


def claims(statement):
    """The statement's numbers and names: threshold, clouds, fewest clients."""
    found = re.match(
        r"any (\d+) of the (\d+) clouds \((.*?)\) can together decrypt, fewer cannot; they answer "
        r"only for sums that the server declares to have (\d+) or more clients, one sum per round; "
        r"the server holds no key share; simulated: one process plays all parties$",
        statement,
    )
    threshold, number, names, fewest = found.groups()
    assert len(names.split(", ")) == int(number)
    return int(threshold), tuple(names.split(", ")), int(fewest)


def interpolated(scheme, holders, coalition):
    """The best a coalition can do: the Lagrange weights for as many shares as it has."""
    points = [holders.group.point(name) for name in coalition]
    total = np.zeros((1, len(scheme.moduli), scheme.ring_dimension), np.uint64)
    for name in coalition:
        rows = zip(holders.parties[name]._held.share_1LN[0], scheme.moduli, strict=True)
        own = holders.group.point(name)
        weighted = [shamir.scale(r, shamir.lagrange_at_zero(points, q)[own], q) for r, q in rows]
        total = add(total, np.stack(weighted)[None], scheme.moduli)
    return total


def subsets(names, sizes):
    return (chosen for size in sizes for chosen in itertools.combinations(names, size))


def test_every_coalition_does_what_the_statement_says(scheme, holders, summed, slots):
    """They pool their shares and break every rule of ``CloudParty``."""
    threshold, clouds, _ = claims(holders.statement())
    assert clouds == holders.clouds and threshold == holders.threshold
    sum_2LN, expected = summed(holders), slots.sum(axis=0)
    for coalition in subsets(clouds, range(1, len(clouds) + 1)):
        secret = interpolated(scheme, holders, coalition)
        part = scheme.decrypt_partially(secret, sum_2LN[1:])
        found = scheme.decode(add(sum_2LN[:1], part, scheme.moduli))
        if len(coalition) >= threshold:
            assert np.array_equal(found, expected)
        else:
            assert found[0] != len(CLIENTS)  # the canary
            assert (found == expected).mean() < 0.01


def test_pooled_shares_below_the_threshold_fit_any_secret(scheme, holders):
    """For whatever the joint secret were, there is a last share that would make it so."""
    some = holders.clouds[: holders.threshold - 1]
    rng = np.random.default_rng(1)
    modulus = scheme.moduli[0]
    points = [holders.group.point(name) for name in holders.clouds[: holders.threshold]]
    weights = shamir.lagrange_at_zero(points, modulus)
    known = sum(
        shamir.scale(
            holders.parties[name]._held.share_1LN[0, 0],
            weights[holders.group.point(name)],
            modulus,
        ).astype(object)
        for name in some
    )
    imagined = rng.integers(0, modulus, scheme.ring_dimension, np.uint64)
    last = (imagined.astype(object) - known) * pow(weights[points[-1]], -1, modulus) % modulus
    back = (known + shamir.scale(last.astype(np.uint64), weights[points[-1]], modulus)) % modulus
    assert np.array_equal(back.astype(np.uint64), imagined)


def test_every_set_that_follows_the_rules_decrypts(scheme, holders, summed, slots):
    threshold, clouds, fewest = claims(holders.statement())
    sum_2LN = summed(holders)
    c0, c1 = (pack(half[None], scheme.moduli) for half in sum_2LN)
    for alive in subsets(clouds, range(1, len(clouds) + 1)):
        asked = (next_round(holders), CLIENTS, c0, c1, 1, alive, Costs())
        if len(alive) < threshold:
            with pytest.raises(BelowThreshold, match=f"needs {threshold} of {len(clouds)} clouds"):
                holders.check_alive(alive)
            with pytest.raises(BelowThreshold):
                holders.decrypt(*asked)
            continue
        holders.check_alive(alive)
        partials = holders.decrypt(*asked)
        assert set(partials) <= set(alive) and len(partials) == threshold
        total = functools.reduce(
            lambda x, y: add(x, y, scheme.moduli), [sum_2LN[:1], *partials.values()]
        )
        assert np.array_equal(scheme.decode(total), slots.sum(axis=0))
    with pytest.raises(Refused, match=f"sums of {fewest} or more clients, asked for one of 1"):
        holders.decrypt(next_round(holders), CLIENTS[:1], c0, c1, 1, clouds, Costs())
    with pytest.raises(Refused, match="bound to one sum"):
        holders.decrypt(next_round(holders) - 1, CLIENTS[:2], c0, c1, 1, clouds, Costs())


def test_answers_below_the_threshold_do_not_fuse(scheme, holders, summed):
    """All but one cloud of a set have answered, by the rules: the sum of what there is is noise."""
    sum_2LN = summed(holders)
    c0, c1 = (pack(half[None], scheme.moduli) for half in sum_2LN)
    number = next_round(holders)
    partials = holders.decrypt(number, CLIENTS, c0, c1, 1, holders.clouds, Costs())
    for absent in partials:
        rest = [part for name, part in partials.items() if name != absent]
        total = functools.reduce(lambda x, y: add(x, y, scheme.moduli), [sum_2LN[:1], *rest])
        assert scheme.decode(total)[0] != len(CLIENTS)


def test_fewest_clients_are_the_statement_s(scheme):
    one = KeyHolders(scheme, NAMES[:2], 2, minimum_clients=1)
    assert claims(one.statement()) == (2, ("aws", "gcp"), 1)
    c1 = bytes(len(pack(one.key.residues_2LN[:1], scheme.moduli)))
    assert len(one.decrypt(0, ["x"], b"", c1, 1, NAMES[:2], Costs())) == 2


def test_a_new_epoch_forgets_the_old_one(scheme, summed, slots):
    """After a rotation neither old ciphertexts, nor old statements, nor old shares serve."""
    holders = KeyHolders(scheme, NAMES[:3], 2)
    old_key, old_words, old_sum = holders.key, holders.confirmations, summed(holders)
    old_shares = {name: party._held.share_1LN for name, party in holders.parties.items()}
    up = dict(holders.ceremony_bytes_up)
    holders.rotate()
    assert holders.key.epoch != old_key.epoch and holders.key.seed != old_key.seed
    assert holders.ceremony_bytes_up == up and min(up.values()) > 0
    assert holders.statement() == KeyHolders(scheme, NAMES[:3], 2).statement()
    check_confirmations(holders.key, holders.group, scheme, holders.roster, holders.confirmations)
    with pytest.raises(BadMessage, match="its signature"):
        check_confirmations(holders.key, holders.group, scheme, holders.roster, old_words)
    statement = Statement(Total.of(old_key.epoch, 5, CLIENTS, b"", b""), NAMES[:2])
    with pytest.raises(BadMessage, match="other keys than this run's"):
        holders.parties["aws"].agree(statement.to_bytes())
    for name, party in holders.parties.items():
        assert (party._held.share_1LN == old_shares[name]).mean() < 0.001
    c0, c1 = (pack(half[None], scheme.moduli) for half in old_sum)
    partials = holders.decrypt(6, CLIENTS, c0, c1, 1, NAMES[:3], Costs())
    total = functools.reduce(
        lambda x, y: add(x, y, scheme.moduli), [old_sum[:1], *partials.values()]
    )
    assert scheme.decode(total)[0] != len(CLIENTS)
    new_sum = summed(holders)
    c0, c1 = (pack(half[None], scheme.moduli) for half in new_sum)
    partials = holders.decrypt(7, CLIENTS, c0, c1, 1, NAMES[:3], Costs())
    total = functools.reduce(
        lambda x, y: add(x, y, scheme.moduli), [new_sum[:1], *partials.values()]
    )
    assert np.array_equal(scheme.decode(total), slots.sum(axis=0))


def test_until_a_rotation_is_finished_the_old_keys_serve(scheme, summed, slots):
    holders = KeyHolders(scheme, NAMES[:2], 2)
    for party in holders.parties.values():
        party.rotate()
        party.ceremony.hello()
    sum_2LN = summed(holders)
    c0, c1 = (pack(half[None], scheme.moduli) for half in sum_2LN)
    partials = holders.decrypt(0, CLIENTS, c0, c1, 1, NAMES[:2], Costs())
    total = functools.reduce(
        lambda x, y: add(x, y, scheme.moduli), [sum_2LN[:1], *partials.values()]
    )
    assert np.array_equal(scheme.decode(total), slots.sum(axis=0))
    holders.rotate()  # a ceremony that came to nothing is replaced
    with pytest.raises(Refused, match="already finished its key ceremony"):
        _ = holders.parties["aws"].ceremony
