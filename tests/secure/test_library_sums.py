"""Modes bfv and ckks beyond the contract: extremes, garbage, coalitions, laziness, rotation."""

import functools
import itertools
import re
import threading

import numpy as np
import pytest

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure import library_sum
from fedjax_llm.secure.ciphertext_round import CiphertextSum
from fedjax_llm.secure.library_message import LibraryClient
from fedjax_llm.secure.library_sum import BfvSum, CkksSum
from fedjax_llm.secure.parameters import choose
from fedjax_llm.secure.plain import PlainSum
from fedjax_llm.secure.residues import pack
from fedjax_llm.secure.shamir import lagrange_at_zero, scale
from fedjax_llm.secure.sums import BadMessage, BelowThreshold, NoAnswer, WrongSum, sum_uploads
from fedjax_llm.secure.wire import UploadWriter

CLOUDS, BOUND, COUNT, SUMMANDS = ("a", "b", "c", "d"), 2**15 - 1, 20_000, 4
MODES = {"bfv": BfvSum, "ckks": CkksSum}
_rounds = itertools.count()


@functools.cache
def sum_of(kind):
    """3 of 4 clouds, two or three ciphertexts per client."""
    return MODES[kind](CLOUDS, 3, COUNT, BOUND, SUMMANDS, threads=2)


@pytest.fixture(scope="session", params=["bfv", "ckks"])
def library(request):
    """Both modes."""
    return sum_of(request.param)


@pytest.fixture
def now():
    """A round number that no other test here has used."""
    return next(_rounds)


def vectors_for(library, clients="xyz"):
    rng = np.random.default_rng(7)
    return {c: rng.integers(-BOUND, BOUND + 1, library.count) for c in clients}


def uploads(library, round_number, vectors):
    return {c: library.upload(c, round_number, ints) for c, ints in vectors.items()}


def forged(library, client, round_number, payloads):
    """What a hostile client sends: its own payloads under its own valid MACs."""
    key = library.channels.key(client)
    writer = UploadWriter(
        library.client.header(client, round_number), key, library.client.ciphertexts
    )
    return [writer.write(payload) for payload in payloads]


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize(("bits", "summands"), [(16, 8), (20, 8), (8, 100), (24, 3)])
def test_exact_at_the_extremes_and_as_the_plain_sum(kind, bits, summands):
    bound, clients = 2 ** (bits - 1) - 1, 5 if summands > 8 else summands
    library = MODES[kind](("a", "b"), 2, 300, bound, summands, threads=1)
    rng = np.random.default_rng(bits)
    vectors = {f"c{i}": rng.integers(-bound, bound + 1, 300) for i in range(clients)}
    for ints in vectors.values():
        ints[:100], ints[100:200] = bound, -bound
    plain = PlainSum(300, bound, summands)
    totals = [
        sum_uploads(mode, uploads(mode, 0, vectors), 0, ("a", "b")).total_P
        for mode in (plain, library)
    ]
    assert totals[0].tobytes() == totals[1].tobytes()
    assert np.array_equal(totals[0], sum(vectors.values()))
    assert totals[0][0] == clients * bound


@pytest.mark.parametrize(
    ("bits", "summands", "clouds", "threshold"),
    [(9, 10, "ab", 2), (8, 4, "abc", 3), (7, 8, "abc", 3), (4, 5, "ab", 2), (2, 50, "ab", 2)],
)
def test_bfv_is_exact_with_the_parameters_of_long_messages(
    bits, summands, clouds, threshold, monkeypatch
):
    """Many integers per slot, up to the last bit that decodes under the clouds' flooding."""
    monkeypatch.setattr(library_sum, "choose", lambda *bounds: choose(*bounds[:3], count=10**6))
    bound = 2 ** (bits - 1) - 1
    library = BfvSum(tuple(clouds), threshold, 1000, bound, summands, threads=1)
    for number in range(3):
        rng = np.random.default_rng(number)
        vectors = {client: rng.integers(-bound, bound + 1, 1000) for client in "xyz"}
        result = sum_uploads(library, uploads(library, number, vectors), number, tuple(clouds))
        assert np.array_equal(result.total_P, sum(vectors.values()))


def test_every_decrypting_set_gives_the_same_sum(library):
    vectors = vectors_for(library)
    for alive in [*itertools.combinations(CLOUDS, 3), CLOUDS]:
        number = next(_rounds)
        result = sum_uploads(library, uploads(library, number, vectors), number, alive)
        assert np.array_equal(result.total_P, sum(vectors.values()))
        assert {name for name, size in result.bytes_up.items() if size} == set(alive[:3])
        assert set(result.seconds) == {"add", "decrypt", "unmask"}


def test_no_coalition_below_the_threshold_decrypts(library, now, monkeypatch):
    """They ignore every rule, use the best weights for their number, and no masks."""
    scheme, parties = library.scheme, library.holders.parties

    def conspiring(coalition, c1s):
        points = [library.holders.group.point(name) for name in coalition]
        partials = {}
        for name, point in zip(coalition, points, strict=True):
            rows = zip(parties[name]._held.share_1LN[0], scheme.moduli, strict=True)
            secret = np.stack([scale(r, lagrange_at_zero(points, q)[point], q) for r, q in rows])
            partials[name] = scheme.decrypt_partially(secret[None], c1s[:1])
        return partials

    vectors = vectors_for(library)
    for coalition in [*itertools.combinations(CLOUDS, 2), ("a",), CLOUDS[:3]]:
        round_sum = library.begin(now)
        for client, chunks in uploads(library, now, vectors).items():
            round_sum.add(client, chunks)
        partials = conspiring(coalition, round_sum._sum._total[:, 1])
        monkeypatch.setattr(type(library.holders), "decrypt", lambda *_, found=partials: found)
        monkeypatch.setattr(type(library.numbers), "take", lambda *_: None)
        if len(coalition) == 3:  # the threshold: this is what decryption is
            first = next(round_sum.pieces(CLOUDS))
            assert np.array_equal(first, sum(vectors.values())[: first.size])
            continue
        with pytest.raises(WrongSum, match=rf"round {now}: .*nothing is returned"):
            next(round_sum.pieces(CLOUDS))


def test_residues_that_a_hostile_client_chooses_reach_no_total(library):
    """Its MAC is right. Random residues, and those of other clients, in any of its ciphertexts."""
    vectors, scheme = vectors_for(library, "xy"), library.scheme
    rng = np.random.default_rng(0)
    primes = np.asarray(scheme.moduli, np.uint64)[None, :, None]
    shape = (2, len(scheme.moduli), scheme.ring_dimension)
    garbage = pack(rng.integers(0, 2**63, shape, dtype=np.uint64) % primes, scheme.moduli)
    zero = bytes(len(garbage))  # a trivial encryption of nothing: no canary in it
    for bad in (garbage, zero):
        for at in range(library.client.ciphertexts):
            number = next(_rounds)
            fair = [library.client.seal(np.ones(9, int)) for _ in range(2)]
            payloads = [*fair, fair[0]][: library.client.ciphertexts]
            payloads[at] = bad
            round_sum = library.begin(number)
            for client, chunks in uploads(library, number, vectors).items():
                round_sum.add(client, chunks)
            round_sum.add("eve", forged(library, "eve", number, payloads))
            with pytest.raises(WrongSum, match=f"round {number}: .*a client has sent what is no"):
                list(round_sum.pieces(CLOUDS))
            with pytest.raises(Refused, match="taken already"):
                next(round_sum.pieces(CLOUDS))


def test_residues_that_are_not_reduced_are_refused_and_cost_nobody_else(library, now):
    vectors = vectors_for(library)
    round_sum = library.begin(now)
    round_sum.add("x", library.upload("x", now, vectors["x"]))
    size = library.client.payload_bytes[0]
    good = library.client.seal(np.ones(9, int))
    for at in range(library.client.ciphertexts):
        payloads = [good] * library.client.ciphertexts
        payloads[at] = b"\xff" * size
        with pytest.raises(BadMessage, match="'y' refused: a residue is not below") as caught:
            round_sum.add("y", forged(library, "y", now, payloads))
        assert caught.value.sender == "y"
    round_sum.add("y", library.upload("y", now, vectors["y"]))
    total = np.concatenate(list(round_sum.pieces(CLOUDS)))
    assert np.array_equal(total, vectors["x"] + vectors["y"])


def test_a_total_beyond_what_its_clients_can_have_sent_is_refused(library, now):
    """One client sends canaries of one, and integers twice the bound."""
    per_ciphertext = library.parameters.per_ciphertext
    payloads = []
    for start in range(0, library.count, per_ciphertext):
        size = min(per_ciphertext, library.count - start)
        payloads.append(library.client.seal(np.full(size, 2 * BOUND)))
    round_sum = library.begin(now)
    round_sum.add("x", library.upload("x", now, np.full(library.count, BOUND)))
    round_sum.add("eve", forged(library, "eve", now, payloads))
    with pytest.raises(WrongSum, match="a client has sent"):
        list(round_sum.pieces(CLOUDS))


def test_a_total_may_be_asked_for_again_when_clouds_are_back(library, now, monkeypatch):
    vectors = vectors_for(library)
    round_sum = library.begin(now)
    for client, chunks in uploads(library, now, vectors).items():
        round_sum.add(client, chunks)
    with pytest.raises(BelowThreshold, match="2 alive, missing c, d"):
        next(round_sum.pieces("ab"))

    def dead(*_):
        raise NoAnswer("a")

    with monkeypatch.context() as patch:
        patch.setattr(library.holders.parties["a"], "agree", dead)
        patch.setattr(library.holders.parties["b"], "agree", dead)
        with pytest.raises(BelowThreshold, match=f"round {now}"):
            next(round_sum.pieces(CLOUDS))
    with pytest.raises(Refused, match="too late"):
        round_sum.add("late", iter(()))
    with pytest.raises(Refused, match="is over"):
        library.begin(now)
    total = np.concatenate(list(round_sum.pieces(CLOUDS)))
    assert np.array_equal(total, sum(vectors.values()))


def test_uploads_are_made_as_they_are_asked_for(library, now, monkeypatch):
    made, vector = [], vectors_for(library)["x"]
    seal, threads = LibraryClient.seal, library.client.threads

    def counted(*arguments):
        made.append(threading.current_thread())
        return seal(*arguments)

    monkeypatch.setattr(LibraryClient, "seal", counted)
    chunks = library.upload("x", now, vector)
    assert not made
    first = next(chunks)
    assert 1 <= len(made) <= threads + 1
    rest = list(chunks)
    assert len(made) == library.client.ciphertexts == 1 + len(rest)
    assert len(first) + sum(map(len, rest)) == library.upload_bytes("x")
    unused = library.upload("x", now, vector)
    next(unused)
    unused.close()


def test_keys_that_rotate_end_the_rounds_under_them():
    library = BfvSum(("a", "b"), 2, 10, 100, 4)
    ints = np.arange(10)
    before = list(library.upload("x", 0, ints))
    old = library.begin(0)
    old.add("x", before)
    library.holders.rotate()
    for call in (lambda: old.add("y", iter(())), lambda: next(old.pieces("ab"))):
        with pytest.raises(Refused, match="the keys have changed since round 0 began"):
            call()
    new = library.begin(0)
    with pytest.raises(BadMessage, match="other keys"):
        new.add("x", before)
    for client in "xy":
        new.add(client, library.upload(client, 0, ints))
    assert np.array_equal(next(new.pieces("ab")), 2 * ints)


def test_a_disk_that_fails_while_adding_spoils_the_round_only(library, now, monkeypatch):
    round_sum = library.begin(now)
    round_sum.add("x", library.upload("x", now, np.zeros(library.count, int)))

    def broken(*_):
        raise OSError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(CiphertextSum, "add", broken)
        with pytest.raises(OSError, match="disk"):
            round_sum.add("y", library.upload("y", now, np.zeros(library.count, int)))
    for call in (lambda: round_sum.add("z", iter(())), lambda: next(round_sum.pieces(CLOUDS))):
        with pytest.raises(Refused, match="broke off while adding"):
            call()
    library.begin(now)


def test_the_accumulator_takes_a_payload_or_leaves_it():
    scheme = sum_of("bfv").scheme
    total = CiphertextSum(scheme, 1)
    payload = sum_of("bfv").client.seal(np.ones(5, np.int16))
    assert len(payload) == total.payload_bytes
    for bad in (b"", payload[:-1], b"\xff" * len(payload)):
        with pytest.raises(BadMessage, match="'eve'"):
            total.check(bad, "eve")
        with pytest.raises(BadMessage, match="'eve'"):
            total.add(bad, sender="eve")
    assert not any(total.c0()) and not any(total.c1())
    total.check(payload, "x")
    total.add(memoryview(payload))
    assert total.c0() + total.c1() == payload


def test_statements_say_who_may_and_what_ckks_gives_away():
    for kind in MODES:
        statement = sum_of(kind).statement()
        assert "any 3 of the 4 clouds (a, b, c, d)" in statement
        assert "2 or more clients" in statement and "\n" not in statement
    assert "CKKS" not in sum_of("bfv").statement()
    said = sum_of("ckks").statement()
    parameters = sum_of("ckks").parameters
    assert "IND-CPA-D" in said and f"{parameters.error_deviation:.2g}" in said
    for distance, found in zip(
        (parameters.noise_distance, parameters.rounding_distance),
        re.findall(r"up to 2\^(-\d+)", said),
        strict=True,
    ):
        assert 2.0 ** (int(found) - 1) < distance <= 2.0 ** int(found)


def test_sizes_for_a_million_parameters():
    """Of 16 bits from 8 clients: what the README says that library ciphertexts cost."""
    made = {kind: MODES[kind](("a", "b", "c"), 2, 10**6, BOUND, 8) for kind in MODES}
    assert made["bfv"].parameters.digits == 2
    assert 25 < made["bfv"].upload_bytes("x") / 10**6 < 25.5
    assert 27.5 < made["ckks"].upload_bytes("x") / 10**6 < 28


def test_bounds_and_groups_without_a_sum_are_refused(monkeypatch):
    for kind in MODES:
        with pytest.raises(UserError, match="at least 1"):
            MODES[kind](CLOUDS, 3, 0, BOUND, SUMMANDS)
        with pytest.raises(UserError, match="use fewer bits"):
            MODES[kind](CLOUDS, 3, 10, 2**40, 2**20)
        for clouds, threshold in ((("a", "b"), 1), (("a",), 1), (("a", "b"), 3), (("a", "a"), 2)):
            with pytest.raises(Refused):
                MODES[kind](clouds, threshold, 10, BOUND, SUMMANDS)
    monkeypatch.setattr(library_sum, "open_bfv", lambda _: pytest.fail("made a context first"))
    with pytest.raises(UserError, match="never has 5"):
        BfvSum(CLOUDS, 3, 10, BOUND, SUMMANDS, minimum_clients=5)
