"""Pairwise masks: exact whoever drops out and when, and nothing to see but one sum per round."""

import contextlib
import itertools
import threading
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import FedJaxError, Refused, UserError
from fedjax_llm.secure import masked_client, masked_deals, masked_shares
from fedjax_llm.secure.channels import SimulatedChannels
from fedjax_llm.secure.identity import Identity, Roster
from fedjax_llm.secure.masked import MaskedSum
from fedjax_llm.secure.masked_client import ClientRound, pair_key
from fedjax_llm.secure.masked_layout import CHUNK_WORDS, Layout, add_packed, pack
from fedjax_llm.secure.masked_masks import (
    Stream,
    add_streams,
    fingerprint,
    pair_stream,
    self_stream,
)
from fedjax_llm.secure.masked_messages import (
    CONSENT,
    RUN_BYTES,
    SIGNATURE_BYTES,
    VIEW,
    Group,
    Hello,
    Request,
    Reveal,
    Survivors,
)
from fedjax_llm.secure.masked_parties import Parties
from fedjax_llm.secure.masked_round import RoundServer
from fedjax_llm.secure.shamir import lagrange_at_zero
from fedjax_llm.secure.sums import BadMessage, BelowThreshold, NoAnswer, WrongSum, sum_uploads

LAYOUT = Layout(count=40, max_abs=1000, summands=5)
FIVE = [Identity.generate(name) for name in "abcde"]
_rounds = itertools.count()


def group_of(identities, threshold, minimum_clients=2):
    roster = Roster([one.public for one in identities])
    return Group(roster, threshold, minimum_clients, run=bytes(RUN_BYTES))


def ints_of(seed, layout=LAYOUT):
    made = np.random.default_rng(seed).integers(-layout.max_abs, layout.max_abs + 1, layout.count)
    made[:2] = layout.max_abs, -layout.max_abs
    return made


class Network:
    """One round step by step; at every step only those named take part."""

    def __init__(self, identities=FIVE, threshold=3, minimum_clients=2, greet=None, deal=None):
        self.group = group_of(identities, threshold, minimum_clients)
        self.round_number = next(_rounds)
        self.context = self.group.context(self.round_number)
        self.server = RoundServer(self.group, self.round_number)
        self.identities = {one.name: one for one in identities}
        names = sorted(self.identities)
        greet = names if greet is None else greet
        self.sharers = greet if deal is None else deal
        self.clients = {
            name: ClientRound(self.group, self.identities[name], self.round_number)
            for name in names
        }
        for name in greet:
            self.server.hello(name, self.clients[name].hello())
        for name in self.sharers:
            self.server.deal(name, self.clients[name].deal(self.server.hellos(name)))
        for name in self.sharers:
            self.server.accepted(name, self.clients[name].accept(self.server.deals(name)))
        self.words = {}

    def upload(self, *names):
        for name in names:
            (payload,) = self.clients[name].upload(LAYOUT, ints_of(ord(name)))
            words = np.zeros(LAYOUT.elements(0), LAYOUT.word)
            add_packed(words, payload.data, LAYOUT.bits)
            self.words[name] = words
        return self

    def agree(self, survivors, names=None):
        statement = self.server.close(survivors)
        for name in self.sharers if names is None else names:
            self.server.consent(name, self.clients[name].consent(statement, self.server.views))
        return self.server.request()

    def reveal(self, request, names=None):
        for name in self.sharers if names is None else names:
            self.server.reveal(name, self.clients[name].reveal(request))

    def total(self, survivors):
        words = sum(self.words[name] for name in survivors)
        add_streams(words, self.server.recover(), 0)
        return LAYOUT.integers(words, len(survivors))


def expected(names):
    return sum(ints_of(ord(name)) for name in names)


# Words, masks, shares.


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 64), st.integers(1, 70), st.integers(0, 2**32))
def test_packing_keeps_the_low_bits_of_every_word_in_the_fewest_bytes(bits, size, seed):
    word = np.dtype("<u4") if bits <= 32 else np.dtype("<u8")
    random = np.random.default_rng(seed)
    words = random.integers(0, np.iinfo(word).max, size, word, endpoint=True)
    start = random.integers(0, np.iinfo(word).max, size, word, endpoint=True)
    packed = pack(words, bits)
    assert size * bits / 8 <= packed.size < size * bits / 8 + 4
    found = start.copy()
    add_packed(found, packed.data, bits)
    assert np.array_equal(found, start + (words & word.type(2**bits - 1)))


@pytest.mark.parametrize("bound", [1, 127, 2**15 - 1, 2**28, 2**31, 2**60])
@pytest.mark.parametrize("summands", [1, 2, 5, 7])
def test_no_sum_wraps_and_the_canary_counts(bound, summands):
    layout = Layout(9, bound, summands)
    for clients in range(1, summands + 1):
        for sign in (1, -1):
            total = sum(layout.words(np.full(9, sign * bound), 0) for _ in range(clients))
            assert np.array_equal(
                layout.integers(total, clients), np.full(9, sign * bound * clients)
            )
            with pytest.raises(WrongSum, match="canary"):
                layout.integers(total, clients + 1)
    assert 2 ** (layout.bits - 1) <= 2 * bound * summands < 2**layout.bits


def test_a_total_beyond_the_bound_is_refused():
    words = LAYOUT.words(np.full(40, 1001), 0)
    with pytest.raises(WrongSum, match="beyond their bound 1000"):
        LAYOUT.integers(words, 1)


def test_chunks_cover_all_integers_once():
    for count in (1, CHUNK_WORDS - 1, CHUNK_WORDS, 2 * CHUNK_WORDS - 2, 2 * CHUNK_WORDS + 5):
        layout = Layout(count, 3, 2)
        ints = np.arange(count) % 4
        words = [layout.words(ints, chunk) for chunk in range(layout.chunks)]
        assert max(part.size for part in words) <= CHUNK_WORDS
        assert np.array_equal(np.concatenate([part[1:] for part in words]), ints)
        assert tuple(pack(part, layout.bits).size for part in words) == layout.payload_bytes


@pytest.mark.parametrize("word", ["<u4", "<u8"])
def test_masks_are_one_counter_mode_stream_over_all_chunks(word):
    key, width = bytes(range(32)), np.dtype(word).itemsize
    cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    whole = np.frombuffer(cipher.update(bytes(width * (CHUNK_WORDS * 2 + 9))), word)
    for chunk, size in ((0, 100), (1, 1), (2, 9)):
        words = np.full(size, 7, word)
        add_streams(words, [Stream(key, subtract=False)], chunk)
        at = chunk * CHUNK_WORDS
        assert np.array_equal(words, whole[at : at + size] + np.dtype(word).type(7))
        add_streams(words, [Stream(key, subtract=False).inverse], chunk)
        assert np.array_equal(words, np.full(size, 7))


def test_streams_of_a_pair_cancel_and_print_no_key():
    one, other = pair_stream(b"k" * 32, "a", "b"), pair_stream(b"k" * 32, "b", "a")
    assert one.inverse == other
    assert "kkk" not in repr(one)
    seed = b"s" * 32
    assert len({seed, self_stream(seed).key, fingerprint(seed)}) == 3


def test_the_field_is_prime_and_holds_every_secret():
    p, odd = masked_shares.PRIME, masked_shares.PRIME - 1
    twos = (odd & -odd).bit_length() - 1
    odd >>= twos
    for base in range(2, 60):  # Miller-Rabin
        power = pow(base, odd, p)
        chain = [pow(power, 2**step, p) for step in range(twos)]
        assert power == 1 or p - 1 in chain
    assert p > 2**256


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.binary(min_size=32, max_size=32), st.data())
def test_any_t_shares_give_the_secret_and_fewer_fit_every_secret(parties, secret, data):
    threshold = data.draw(st.integers(1, parties))
    points = range(1, parties + 1)
    shares = masked_shares.split(secret, threshold, points)
    assert all(masked_shares.is_share(share) for share in shares.values())
    for chosen in combinations(points, threshold):
        weights = lagrange_at_zero(chosen, masked_shares.PRIME)
        assert masked_shares.rebuild({p: shares[p] for p in chosen}, weights) == secret
    # With one share less, some last share leads to any other secret: all are as likely.
    chosen = list(points)[:threshold]
    weights = lagrange_at_zero(chosen, masked_shares.PRIME)
    other = int.from_bytes(bytes(reversed(secret)), "little")
    known = sum(weights[p] * int.from_bytes(shares[p], "little") for p in chosen[1:])
    last = (other - known) * pow(weights[chosen[0]], -1, masked_shares.PRIME) % masked_shares.PRIME
    forged = {p: shares[p] for p in chosen} | {chosen[0]: last.to_bytes(33, "little")}
    assert masked_shares.rebuild(forged, weights) == bytes(reversed(secret))


def test_shares_of_nonsense_are_refused():
    for points in ([0, 1], [1, 1], [masked_shares.PRIME, 1]):
        with pytest.raises(UserError, match="distinct"):
            masked_shares.split(bytes(32), 2, points)
    with pytest.raises(UserError, match="threshold"):
        masked_shares.split(bytes(32), 3, [1, 2])
    with pytest.raises(UserError, match="32 bytes"):
        masked_shares.split(bytes(31), 2, [1, 2])
    assert masked_shares.rebuild({1: (2**256 + 1).to_bytes(33, "little")}, {1: 1}) is None
    assert not masked_shares.is_share(masked_shares.PRIME.to_bytes(33, "little"))


# Whoever drops out, and when.


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_exact_or_refused_whoever_drops_out_at_any_step(data):
    def some(names, least=0):
        return sorted(data.draw(st.sets(st.sampled_from(names), min_size=least)))

    threshold = data.draw(st.integers(3, 5))
    greet = some(list("abcde"), threshold)
    deal = some(greet, threshold)
    round_ = Network(threshold=threshold, greet=greet, deal=deal)
    uploaded = some(deal, 2)
    round_.upload(*uploaded)
    signed = some(deal)
    if len(signed) < threshold:
        with pytest.raises(BelowThreshold, match="agreed"):
            round_.agree(uploaded, signed)
        return
    request = round_.agree(uploaded, signed)
    revealed = some(signed)
    round_.reveal(request, revealed)
    if len(revealed) < threshold:
        with pytest.raises(BelowThreshold) as below:
            round_.total(uploaded)
        for name in set("abcde") - set(revealed):
            assert f" {name}" in str(below.value)
        round_.reveal(request, signed)  # they come back, and the same set is revealed
    assert np.array_equal(round_.total(uploaded), expected(uploaded))


def test_too_few_at_the_start_are_named():
    for step in ({"greet": ["a", "b"]}, {"deal": ["a", "e"]}):
        with pytest.raises(BelowThreshold, match=r"needs 3 of 5 clients, 2 .*missing .*c"):
            Network(**step)


def test_a_client_that_stops_in_the_middle_of_its_upload_costs_only_itself():
    sums = MaskedSum(["a", "b", "c"], CHUNK_WORDS + 10, 100, 3)
    ints = {name: np.full(sums.count, number) for number, name in enumerate("abc", start=1)}
    round_sum = sums.begin(0)
    broken = itertools.islice(sums.upload("b", 0, ints["b"]), 1)
    with pytest.raises(BadMessage, match="'b' refused: it ended after 1 of 2"):
        round_sum.add("b", broken)
    round_sum.add("a", sums.upload("a", 0, ints["a"]))
    round_sum.add("c", sums.upload("c", 0, ints["c"]))
    total = np.concatenate(list(round_sum.pieces(["a", "c"])))
    assert np.array_equal(total, np.full(sums.count, 4))


def test_clients_that_die_while_the_sum_is_uncovered_are_left_out(monkeypatch):
    sums = MaskedSum(["a", "b", "c", "d", "e"], 10, 100, 5)
    uploads = {name: list(sums.upload(name, 0, np.full(10, 3))) for name in "abcde"}

    def dead(self, *asked):
        raise NoAnswer(self.client)

    parties = sums.rounds.parties(0).clients
    monkeypatch.setattr(parties["a"], "consent", dead.__get__(parties["a"]))
    monkeypatch.setattr(parties["b"], "reveal", dead.__get__(parties["b"]))
    assert (sum_uploads(sums, uploads, 0, "abcde").total_P == 15).all()


# What can be seen, and by whom.


def test_uploads_are_uniform_and_differ_from_the_integers_and_from_each_other():
    layout = Layout(2**15, 2**15 - 1, 2**8)  # 24 bits
    parties = Parties(group_of(FIVE, 3), FIVE, next(_rounds))
    again = Parties(group_of(FIVE, 3), FIVE, next(_rounds))
    zeros = np.zeros(layout.count, np.int32)
    sent = [next(made.clients[n].upload(layout, zeros)) for made in (parties, again) for n in "ab"]
    for payload in sent:
        counts = np.bincount(payload, minlength=256)
        # Chi-square with 255 degrees of freedom: 400 is beyond the 1 - 1e-7 quantile.
        assert ((counts - payload.size / 256) ** 2 / (payload.size / 256)).sum() < 400
    for one, other in combinations(sent, 2):
        assert np.mean(one == other) < 0.01


def test_an_upload_that_comes_after_its_sender_was_given_up_stays_hidden():
    round_ = Network().upload("a", "b", "c")
    (late,) = round_.clients["e"].upload(LAYOUT, ints_of(5))
    round_.reveal(round_.agree(["a", "b", "c"]))
    assert np.array_equal(round_.total("abc"), expected("abc"))
    # The server now knows e's mask key, hence all pair masks on its upload.
    words = np.zeros(LAYOUT.elements(0), LAYOUT.word)
    add_packed(words, late.data, LAYOUT.bits)
    add_streams(words, [stream.inverse for stream in round_.clients["e"]._streams[1:]], 0)
    with pytest.raises(WrongSum):
        LAYOUT.integers(words, 1)
    add_streams(words, [round_.clients["e"]._streams[0].inverse], 0)  # but for the self mask
    assert np.array_equal(LAYOUT.integers(words, 1), ints_of(5))


def secret_from(round_, owner, kind, holders):
    """What these clients and the server can make of the shares that they hold."""
    points = [round_.group.points[name] for name in holders]
    held = {
        round_.group.points[name]: getattr(round_.clients[name], f"_{kind}_shares")[owner]
        for name in holders
    }
    return masked_shares.rebuild(held, lagrange_at_zero(points, masked_shares.PRIME))


@pytest.mark.parametrize("threshold", [3, 4, 5])
def test_coalitions_below_the_threshold_rebuild_no_seed_and_t_do(threshold):
    round_ = Network(threshold=threshold)
    for size in range(1, 6):
        for coalition in combinations("abcde", size):
            for owner in set("abcde") - set(coalition):
                client = round_.clients[owner]
                enough = size >= threshold
                seed = secret_from(round_, owner, "seed", coalition)
                key = secret_from(round_, owner, "key", coalition)
                assert (seed == client._seed) == enough
                assert (key == client._mask_key.private_bytes_raw()) == enough


class LyingServer:
    """The server and its helpers, which keep no rule. The victim is the last of the clients."""

    def __init__(self, n, threshold, minimum_clients, helpers, told=None):
        """Steps 0 to 2; ``told`` is who dealt as the victim hears it, else as it is."""
        self.names = "abcdefgh"[:n]
        self.victim, self.helpers = self.names[-1], self.names[:helpers]
        self.honest = self.names[helpers:]
        self.identities = {name: Identity.generate(name) for name in self.names}
        self.group = group_of(list(self.identities.values()), threshold, minimum_clients)
        self.context = self.group.context(0)
        self.clients = {
            name: ClientRound(self.group, one, 0) for name, one in self.identities.items()
        }
        self.hellos = {name: client.hello() for name, client in self.clients.items()}
        deals = {name: client.deal(self.hellos) for name, client in self.clients.items()}
        self.views = {}
        for name, client in self.clients.items():
            dealt = told if told and name == self.victim else self.names
            mine = {dealer: deals[dealer][name] for dealer in dealt if dealer != name}
            self.views[name] = client.accept(mine)
        self.told = told or self.names
        self.ints = ints_of(7)
        (payload,) = self.clients[self.victim].upload(LAYOUT, self.ints)
        self.words = np.zeros(LAYOUT.elements(0), LAYOUT.word)
        add_packed(self.words, payload.data, LAYOUT.bits)
        for name in self.names[:-1]:
            list(self.clients[name].upload(LAYOUT, ints_of(1)))
        # Helpers hand over all that they hold, of either kind.
        self.shares = {
            (kind, name): {
                self.group.points[helper]: held[name]
                for helper in self.helpers
                for held in [getattr(self.clients[helper], f"_{kind}_shares")]
            }
            for kind in ("seed", "key")
            for name in self.names
        }

    def shows(self, survivors, honest):
        """Asks these for the set, and keeps whatever they reveal."""
        transcript = masked_client.transcript(self.hellos[name] for name in self.names)
        shown = Survivors(tuple(self.names), tuple(sorted(survivors)), transcript)
        data, fields = (
            shown.to_bytes(self.group, self.context),
            shown.fields(self.group, self.context),
        )
        signed = {n: self.identities[n].sign(CONSENT, *fields) for n in self.helpers}
        signed_view = shown.view.fields(self.group, self.context)
        views = dict(self.views)
        views |= {n: self.identities[n].sign(VIEW, *signed_view) for n in self.helpers}
        for name in honest:
            with contextlib.suppress(Refused):
                signed[name] = self.clients[name].consent(data, views)
        request = Request(data, signed).to_bytes(self.group)
        for name in honest:
            with contextlib.suppress(Refused):
                found = Reveal.verified(
                    self.clients[name].reveal(request), name, self.group, data, len(self.names)
                )
                for owner, share in zip(self.names, found.shares, strict=True):
                    kind = "seed" if owner in survivors else "key"
                    self.shares[kind, owner][self.group.points[name]] = share

    def secret(self, kind, owner):
        """A secret of a client from all shares at hand; None if they are too few."""
        if owner in self.helpers:
            client = self.clients[owner]
            return client._seed if kind == "seed" else client._mask_key.private_bytes_raw()
        chosen = dict(list(self.shares[kind, owner].items())[: self.group.threshold])
        if len(chosen) < self.group.threshold:
            return None
        weights = lagrange_at_zero(list(chosen), masked_shares.PRIME)
        return masked_shares.rebuild(chosen, weights)

    def uncovers(self):
        """Whether the victim's integers can be taken out of its upload."""
        streams = [self.secret("seed", self.victim)]
        if streams[0] is None:
            return False
        streams = [self_stream(streams[0])]
        of_victim = self.secret("key", self.victim)
        for name in set(self.told) - {self.victim}:
            # The key of either of them gives that of the pair.
            secret, owner, other = of_victim, self.victim, name
            if secret is None:
                secret, owner, other = self.secret("key", name), name, self.victim
            if secret is None:
                return False
            key = X25519PrivateKey.from_private_bytes(secret)
            public = Hello.verified(self.hellos[other], other, self.group, self.context).mask_public
            pair = pair_key(key, owner, public, other, self.context)
            streams.append(pair_stream(pair, self.victim, name))
        words = self.words.copy()
        add_streams(words, [stream.inverse for stream in streams], 0)
        assert np.array_equal(LAYOUT.integers(words, 1), self.ints)
        return True


def two_sets(*case):
    """Half of the honest clients see the victim among the survivors, the others do not."""
    server = LyingServer(*case)
    half = len(server.honest) // 2
    server.shows(server.names, server.honest[half:])
    server.shows(server.names[:-1], server.honest[:half])
    return server.uncovers()


def smallest_set(*case):
    """The survivors are the victim and as many helpers as there are."""
    server = LyingServer(*case)
    others = server.names[: max(0, server.group.minimum_clients - 1)]
    server.shows({server.victim, *others}, server.honest)
    return server.uncovers()


def isolation(n, threshold, minimum_clients, helpers):
    """The victim pairs with t - 1 clients alone, and the honest ones among them are dropped."""
    told = "abcdefgh"[: threshold - 1]
    server = LyingServer(n, threshold, minimum_clients, helpers, told + "abcdefgh"[n - 1])
    server.shows(
        set(server.names) - (set(told) - set(server.helpers)), set(server.honest) - {server.victim}
    )
    return server.uncovers()


SIZES = [
    *((2, 2, 1), (2, 2, 2), (3, 2, 2), (3, 2, 3), (3, 3, 2), (4, 3, 3), (4, 3, 4), (5, 3, 3)),
    *((5, 3, 5), (5, 4, 2), (5, 4, 4), (5, 5, 2), (5, 5, 4), (5, 5, 5), (6, 4, 5), (7, 6, 6)),
]


@pytest.mark.parametrize(("n", "threshold", "minimum_clients"), SIZES)
def test_a_lying_server_needs_the_helpers_that_the_statement_names(n, threshold, minimum_clients):
    names = "abcdefgh"[:n]
    sums = MaskedSum(names, 1, 1, n, threshold, minimum_clients)
    needed = sums.group.helpers
    if minimum_clients < n:
        assert needed == min(2 * threshold - n, minimum_clients - 1)
    says = f"needs {min(threshold, n - 1)} clients on its side, or {needed} if it lies"
    assert says in sums.statement()
    for helpers in range(min(needed + 2, n)):
        case = n, threshold, minimum_clients, helpers
        found = [attack(*case) for attack in (two_sets, smallest_set, isolation)]
        assert any(found) == (helpers >= needed)


@pytest.mark.parametrize(
    ("n", "threshold", "minimum_clients"), [(5, 3, 3), (5, 4, 2), (8, 5, 4), (8, 7, 2)]
)
def test_a_client_that_was_told_of_other_dealers_is_not_uncovered(n, threshold, minimum_clients):
    """It is never asked: the clients that are asked see that it did not pair as they did."""
    told = "abcdefgh"[: threshold - 1]
    server = LyingServer(n, threshold, minimum_clients, 0, told + "abcdefgh"[n - 1])
    transcript = masked_client.transcript(server.hellos[name] for name in server.names)
    survivors = tuple(name for name in server.names if name not in told)
    shown = Survivors(tuple(server.names), survivors, transcript)
    data = shown.to_bytes(server.group, server.context)
    without = {name: view for name, view in server.views.items() if name != server.victim}
    swapped = server.views | {server.victim: server.views["a"]}
    for name in server.names[:-1]:
        for views in (server.views, without, swapped, {}):
            with pytest.raises(BadMessage, match=r"masked view.* is not valid") as bad:
                server.clients[name].consent(data, views)
            assert bad.value.sender == (server.victim if views else survivors[0])
    assert not isolation(n, threshold, minimum_clients, 0)


# What clients refuse.


def test_one_survivor_set_per_round():
    round_ = Network().upload("a", "b", "c", "d")
    statement = round_.server.close(["a", "b", "c"])
    first = round_.clients["a"].consent(statement, round_.server.views)
    assert round_.clients["a"].consent(statement, round_.server.views) == first
    with pytest.raises(Refused, match="has been closed with the clients a, b, c"):
        round_.server.close(["a", "b"])
    other = Survivors(
        tuple("abcde"),
        ("a", "b"),
        Survivors.from_bytes(statement, round_.group, round_.context).transcript,
    )
    data = other.to_bytes(round_.group, round_.context)
    with pytest.raises(Refused, match="signs no other set"):
        round_.clients["a"].consent(data, round_.server.views)
    # Even with all signatures under the other set, it reveals only for the one that it signed.
    fields = other.fields(round_.group, round_.context)
    signed = {one.name: one.sign(CONSENT, *fields) for one in FIVE}
    request = Request(data, signed).to_bytes(round_.group)
    for name in "ab":
        with pytest.raises(Refused, match="for the set that it signed"):
            round_.clients[name].reveal(request)


def test_a_reveal_holds_one_share_of_each_client_and_never_both():
    round_ = Network().upload("a", "b", "c")
    request = round_.agree(["a", "b", "c"])
    survivors = Request.from_bytes(request, round_.group).survivors
    data = round_.clients["a"].reveal(request)
    made = Reveal.verified(data, "a", round_.group, survivors, 5)
    client = round_.clients["a"]
    expected_shares = [client._seed_shares[n] for n in "abc"] + [
        client._key_shares[n] for n in "de"
    ]
    assert list(made.shares) == expected_shares
    # A client that sends both shares of b is refused, whichever place it puts the second in.
    both = (*expected_shares, client._key_shares["b"])
    for shares in (both, (*both[:2], both[-1], *both[3:5])):
        with pytest.raises(BadMessage, match="'a' refused"):
            round_.server.reveal("a", Reveal(shares).signed(survivors, FIVE[0]))


def test_small_sums_strangers_and_false_survivors_are_refused_by_clients():
    round_ = Network(minimum_clients=3).upload("a", "b", "c")
    transcript = Survivors.from_bytes(
        round_.server.close(["a", "b", "c"]), round_.group, round_.context
    ).transcript
    sharers = tuple("abcde")
    cases = [
        (Survivors(sharers, ("a", "b"), transcript), Refused, "of 3 or more clients"),
        (Survivors(sharers, ("a", "b", "e"), transcript), Refused, "'e' sent no upload"),
        (Survivors(("a", "b", "c", "e"), ("a", "b", "c"), transcript), BadMessage, "others dealt"),
        (Survivors(sharers, ("a", "b", "c"), bytes(32)), BadMessage, "others dealt"),
        (Survivors(("a", "b"), ("a", "b", "c"), transcript), BadMessage, "never dealt"),
    ]
    for shown, kind, reason in cases:
        with pytest.raises(kind, match=reason):
            round_.clients["e"].consent(
                shown.to_bytes(round_.group, round_.context), round_.server._views
            )
    other_round = Network(minimum_clients=3)
    with pytest.raises(BadMessage, match="another round"):
        other_round.clients["e"].consent(round_.server.close(["a", "b", "c"]), round_.server.views)
    for few in (["a", "b"], ["a", "b", "b"]):
        with pytest.raises(Refused, match="at least 3"):
            other_round.server.close(few)


def test_wrong_and_missing_signatures_reveal_nothing():
    round_ = Network().upload("a", "b", "c")
    statement = round_.server.close(["a", "b", "c"])
    views = round_.server.views
    good = {name: client.consent(statement, views) for name, client in round_.clients.items()}
    with pytest.raises(BadMessage, match="message of 'b' refused: its signature"):
        round_.server.consent("b", good["a"])
    forged = Request(statement, {"a": good["a"], "b": good["a"], "c": good["c"]})
    with pytest.raises(BadMessage, match="message of 'b' refused: its signature"):
        round_.clients["d"].reveal(forged.to_bytes(round_.group))
    few = Request(statement, {"a": good["a"], "b": good["b"]})
    with pytest.raises(Refused, match=r"2 clients signed the survivors of round .*takes 3"):
        round_.clients["d"].reveal(few.to_bytes(round_.group))
    with pytest.raises(BelowThreshold, match="0 agreed"):
        round_.server.request()


def test_a_second_upload_passes_only_with_the_same_integers():
    sums = MaskedSum(["a", "b"], 5, 100, 2)
    first = [
        bytes(part)
        for part in sums.rounds.parties(0).clients["a"].upload(sums.layout, np.arange(5))
    ]
    again = [
        bytes(part)
        for part in sums.rounds.parties(0).clients["a"].upload(sums.layout, np.arange(5))
    ]
    assert first == again
    for other in (np.arange(5) + 1, np.zeros(5, int)):
        with pytest.raises(Refused, match="'a' has sent other integers in round 0"):
            sums.upload("a", 0, other)
    sums.upload("a", 1, np.zeros(5, int))
    uploads = {name: sums.upload(name, 0, np.arange(5, dtype=np.int8)) for name in "ab"}
    assert np.array_equal(sum_uploads(sums, uploads, 0, "ab").total_P, 2 * np.arange(5))


def test_integers_that_change_between_chunks_are_not_sent():
    sums = MaskedSum(["a", "b"], CHUNK_WORDS + 3, 100, 2)
    ints = np.zeros(sums.count, np.int64)
    chunks = sums.upload("a", 0, ints)
    next(chunks)
    ints[-1] = 1
    with pytest.raises(Refused, match="changed during"):
        next(chunks)


def test_no_upload_after_the_survivors_are_agreed_on():
    round_ = Network().upload("a", "b")
    round_.agree(["a", "b"])
    with pytest.raises(Refused, match="'c' is too late"):
        round_.clients["c"].upload(LAYOUT, ints_of(3))
    round_.upload("a")  # the same bytes again are harmless


# Wrong messages are named.


def test_a_share_that_was_not_dealt_is_laid_at_its_senders_door():
    round_ = Network().upload("a", "b", "c")
    request = round_.agree(["a", "b", "c"])
    survivors = Request.from_bytes(request, round_.group).survivors
    client = round_.clients["d"]
    right = [client._seed_shares[n] for n in "abc"] + [client._key_shares[n] for n in "de"]
    for place in range(5):
        wrong = list(right)
        wrong[place] = bytes(33)
        with pytest.raises(BadMessage, match="'d' refused: it revealed another share") as bad:
            round_.server.reveal("d", Reveal(tuple(wrong)).signed(survivors, FIVE[3]))
        assert bad.value.sender == "d"
    out_of_field = (b"\xff" * 33, *right[1:])
    with pytest.raises(BadMessage, match="no element of the field"):
        round_.server.reveal("d", Reveal(out_of_field).signed(survivors, FIVE[3]))
    with pytest.raises(BadMessage, match="'d' refused: its signature"):
        round_.server.reveal("d", Reveal(tuple(right)).signed(survivors, FIVE[2]))
    round_.reveal(request, "abc")  # the others are enough
    assert np.array_equal(round_.total("abc"), expected("abc"))


@pytest.mark.parametrize("secret", ["_seed", "_mask_key"])
def test_a_dealer_of_other_secrets_than_announced_is_named(secret):
    group, number = group_of(FIVE, 3), next(_rounds)
    clients = {one.name: ClientRound(group, one, number) for one in FIVE}
    server = RoundServer(group, number)
    for name, client in clients.items():
        server.hello(name, client.hello())
    setattr(clients["e"], secret, bytes(32) if secret == "_seed" else X25519PrivateKey.generate())
    for name, client in clients.items():
        server.deal(name, client.deal(server.hellos(name)))
    for name, client in clients.items():
        server.accepted(name, client.accept(server.deals(name)))
    survivors = list("abcde") if secret == "_seed" else list("abcd")
    for name in survivors:
        list(clients[name].upload(LAYOUT, ints_of(0)))
    statement = server.close(survivors)
    for name, client in clients.items():
        server.consent(name, client.consent(statement, server.views))
    for name, client in clients.items():
        server.reveal(name, client.reveal(server.request()))
    with pytest.raises(BadMessage, match="'e' refused: it dealt shares of another"):
        server.recover()


def test_hellos_and_deals_of_others_are_refused():
    group = group_of(FIVE, 3)
    server, other = RoundServer(group, 7), RoundServer(group, 8)
    clients = {one.name: ClientRound(group, one, 7) for one in FIVE}
    with pytest.raises(BadMessage, match="'b' refused: its signature"):
        server.hello("b", clients["a"].hello())
    with pytest.raises(BadMessage, match="another round"):
        other.hello("a", clients["a"].hello())
    with pytest.raises(BadMessage, match="stranger"):
        server.hello("z", clients["a"].hello())
    for name, client in clients.items():
        server.hello(name, client.hello())
    with pytest.raises(BadMessage, match="second hello"):
        server.hello("a", ClientRound(group, FIVE[0], 7).hello())
    hellos = server.hellos("a")
    with pytest.raises(BadMessage, match="does not pass on the hello of 'a'"):
        clients["a"].deal(hellos | {"a": hellos["b"]})
    with pytest.raises(BadMessage, match="'c' refused: its signature"):
        clients["a"].deal(hellos | {"c": hellos["b"]})
    with pytest.raises(Refused, match="out of order"):
        clients["a"].accept({})
    deals = {name: client.deal(hellos) for name, client in clients.items()}
    with pytest.raises(Refused, match="has dealt"):
        clients["a"].deal(hellos)
    with pytest.raises(BadMessage, match="to exactly the clients that greeted"):
        server.deal("a", {name: deals["a"][name] for name in "abcd"})
    relayed = {name: deals[name]["a"] for name in "bcde"}
    for wrong in (deals["b"]["c"], deals["c"]["a"], deals["b"]["b"]):
        with pytest.raises(BadMessage, match="'b' refused: its sealed shares for 'a' do not open"):
            clients["a"].accept(relayed | {"b": wrong})
    clients["a"].accept(relayed)
    with pytest.raises(Refused, match="out of order"):
        clients["a"].accept(relayed)


def greeted(*names):
    group, number = group_of(FIVE[:4], 3), next(_rounds)
    clients = {one.name: ClientRound(group, one, number) for one in FIVE[:4]}
    server = RoundServer(group, number)
    for name in names:
        server.hello(name, clients[name].hello())
    return server, clients


def test_who_greets_late_is_refused_and_costs_the_others_nothing():
    server, clients = greeted("a", "b")
    with pytest.raises(BelowThreshold, match=r"needs 3 of 4 clients, 2 greeted, missing c, d"):
        server.hellos("a")
    server.hello("c", clients["c"].hello())  # nobody had been told, so that it is in time
    for name in "dz":
        with pytest.raises(BadMessage, match=r"did not greet|stranger"):
            server.hellos(name)
    deals = {name: clients[name].deal(server.hellos(name)) for name in "abc"}
    with pytest.raises(Refused, match=r"'d' is too late for round .* who greeted"):
        server.hello("d", clients["d"].hello())
    server.hello("a", clients["a"].hello())  # the same again
    with pytest.raises(BadMessage, match="'a' refused: a second hello"):
        server.hello("a", ClientRound(server._group, FIVE[0], server._round).hello())
    with pytest.raises(BadMessage, match="'d' refused: it did not greet"):
        server.deal("d", deals["a"])
    for name, dealt in deals.items():
        server.deal(name, dealt)
    with pytest.raises(BadMessage, match="'d' refused: it dealt no shares"):
        server.deals("d")
    for name in "abc":
        server.accepted(name, clients[name].accept(server.deals(name)))
    assert server.sharers == tuple("abc")


def test_who_deals_late_is_refused_and_costs_the_others_nothing():
    server, clients = greeted(*"abcd")
    deals = {name: client.deal(server.hellos(name)) for name, client in clients.items()}
    for name in "ab":
        server.deal(name, deals[name])
    with pytest.raises(BelowThreshold, match=r"needs 3 of 4 clients, 2 dealt .*missing c, d"):
        server.deals("a")
    with pytest.raises(BadMessage, match="'a' refused: it signs for deals that nobody"):
        server.accepted("a", bytes(SIGNATURE_BYTES))
    server.deal("c", deals["c"])
    server.accepted("a", clients["a"].accept(server.deals("a")))
    with pytest.raises(Refused, match=r"'d' is too late for round .* who dealt"):
        server.deal("d", deals["d"])
    with pytest.raises(BadMessage, match="'a' refused: it must deal once"):
        server.deal("a", deals["a"])
    for name in "bc":
        server.accepted(name, clients[name].accept(server.deals(name)))
    for name in "abc":
        list(clients[name].upload(LAYOUT, ints_of(0)))
    statement = server.close("abc")
    for name in "abc":
        server.consent(name, clients[name].consent(statement, server.views))
    assert server.request()


def test_a_survivor_that_did_not_sign_for_its_deals_is_named():
    server, clients = greeted(*"abcd")
    for name, client in clients.items():
        server.deal(name, client.deal(server.hellos(name)))
    views = {name: client.accept(server.deals(name)) for name, client in clients.items()}
    for wrong in (views["a"], bytes(SIGNATURE_BYTES), b""):
        with pytest.raises(BadMessage, match=r"'d' refused: its signature .masked view"):
            server.accepted("d", wrong)
    for name in "abc":
        server.accepted(name, views[name])
    with pytest.raises(BadMessage, match="'d' refused: it has not signed for the shares"):
        server.close("abcd")
    with pytest.raises(BadMessage, match=r"stranger|dealt no shares"):
        server.accepted("z", views["a"])
    assert server.close("abc")  # the refused set is not one that was closed


@pytest.mark.parametrize("step", ["deal", "accept"])
def test_of_two_racing_calls_one_is_refused(step, monkeypatch):
    """Two sharings sealed under one key and nonce would show their difference."""
    server, clients = greeted(*"abcd")
    asked = clients["a"]
    given = server.hellos("a")
    slow = "split"
    if step == "accept":
        for name, client in clients.items():
            server.deal(name, client.deal(server.hellos(name)))
        given, slow = server.deals("a"), "is_share"
    meeting = threading.Barrier(2)
    module = masked_shares if step == "deal" else masked_deals
    real = getattr(module, slow)

    def waits(*args):
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(0.5)  # both are here at once, unless one is kept out
        return real(*args)

    monkeypatch.setattr(module, slow, waits)
    answers, refused = [], []

    def call():
        try:
            answers.append(getattr(asked, step)(given))
        except Refused as err:
            refused.append(err)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(answers), len(refused)) == (1, 1)
    assert not meeting.n_waiting
    assert meeting.broken


def test_views_are_in_the_costs():
    """Everything that crosses the network but the uploads, byte by byte."""
    round_ = Network().upload("a", "b", "c")
    request = round_.agree("abc")
    round_.reveal(request)
    server, up, down = round_.server, {}, {}
    views = server.views
    assert sorted(views) == ["a", "b", "c"]
    assert {len(view) for view in views.values()} == {SIGNATURE_BYTES}
    survivors = Request.from_bytes(request, round_.group).survivors
    hellos = sum(map(len, server._hello_bytes.values()))
    for name, client in round_.clients.items():
        dealt = sum(map(len, server._deals[name].values()))
        got = sum(len(deals[name]) for dealer, deals in server._deals.items() if dealer != name)
        up[name] = len(client.hello()) + dealt + 2 * SIGNATURE_BYTES + len(client.reveal(request))
        down[name] = hellos + got + len(survivors) + 3 * SIGNATURE_BYTES + len(request)
    assert server.bytes_up == up
    assert server.bytes_down == down


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_bytes_give_an_answer_or_an_error_of_this_package(data):
    round_ = FUZZED
    kind = data.draw(st.sampled_from(sorted(MESSAGES)))
    good, receive = MESSAGES[kind]
    wrong = bytearray(good)
    wrong[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    cut = good[: data.draw(st.integers(0, len(good) - 1))]
    for bad in (bytes(wrong), cut, good + b"\0", data.draw(st.binary(max_size=200))):
        with pytest.raises(FedJaxError):
            receive(round_, bad)


FUZZED = Network().upload("a", "b", "c")
_REQUEST = FUZZED.agree(["a", "b", "c"])
MESSAGES = {
    "hello": (FUZZED.clients["a"].hello(), lambda r, x: r.server.hello("a", x)),
    "deal": (
        FUZZED.server.deals("a")["b"],
        lambda r, x: r.clients["a"]._sealing.open(r.clients["a"]._hellos["b"], x),
    ),
    "survivors": (
        FUZZED.server.close("abc"),
        lambda r, x: r.clients["a"].consent(x, r.server.views),
    ),
    "view": (FUZZED.server.views["b"], lambda r, x: r.server.accepted("b", x)),
    "shown view": (
        FUZZED.server.views["b"],
        lambda r, x: r.clients["a"].consent(r.server.close("abc"), r.server.views | {"b": x}),
    ),
    "consent": (FUZZED.server._consents["a"], lambda r, x: r.server.consent("a", x)),
    "request": (_REQUEST, lambda r, x: r.clients["a"].reveal(x)),
    "reveal": (FUZZED.clients["a"].reveal(_REQUEST), lambda r, x: r.server.reveal("a", x)),
}


def test_an_upload_under_other_masks_is_found_by_the_canary():
    sums = MaskedSum(["a", "b", "c"], 50, 2**20, 3)
    party = sums.rounds.parties(0).clients["c"]
    party._streams[1] = Stream(bytes(32), subtract=False)
    uploads = {name: list(sums.upload(name, 0, np.zeros(50, int))) for name in "abc"}
    with pytest.raises(WrongSum, match="canary of the sum is"):
        sum_uploads(sums, uploads, 0, "abc")


# The sum as a whole.


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.sampled_from([1, 100, 2**15 - 1, 2**31, 2**40]), st.data())
def test_sums_are_those_of_numpy(clients, bound, data):
    names = [f"client {number}" for number in range(clients)]
    sums = MaskedSum(names, 33, bound, clients, minimum_clients=1)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    for number in range(2):
        chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        ints = {name: random.integers(-bound, bound + 1, 33) for name in chosen}
        uploads = {name: list(sums.upload(name, number, ints[name])) for name in chosen}
        for name, chunks in uploads.items():
            assert sum(map(len, chunks)) == sums.upload_bytes(name)
        alive = data.draw(st.sampled_from([names[: clients // 2 + 1], names]))
        result = sum_uploads(sums, uploads, number, alive)
        assert result.participants == tuple(sorted(chosen))
        assert np.array_equal(result.total_P, sum(ints.values()))
        assert result.total_P.dtype == np.int64
        assert set(result.seconds) == {"add", "decrypt", "unmask"}
        assert min(result.bytes_up.values()) > 0 and min(result.bytes_down.values()) > 0


def test_below_threshold_costs_nothing_and_can_be_tried_again():
    sums = MaskedSum(["a", "b", "c", "d"], 5, 10, 4)
    uploads = {name: list(sums.upload(name, 3, np.arange(5))) for name in "ab"}
    round_sum = sums.begin(3)
    for name, chunks in uploads.items():
        round_sum.add(name, chunks)
    for alive in (["a", "b"], ["stranger"], []):
        with pytest.raises(BelowThreshold, match=r"needs 3 of 4 .*missing .*c, d"):
            round_sum.pieces(alive)
        with pytest.raises(BelowThreshold):
            sums.check_alive(alive)
    sums.check_alive(["a", "b", "c"])
    (total,) = round_sum.pieces(["a", "b", "c"])
    assert np.array_equal(total, 2 * np.arange(5))
    with pytest.raises(Refused, match="taken"):
        round_sum.pieces(["a", "b", "c"])
    for call in (lambda: sums.begin(3), lambda: sums.upload("a", 2, np.arange(5))):
        with pytest.raises(Refused, match="round"):
            call()


def test_secrets_of_rounds_do_not_pile_up():
    sums = MaskedSum(["a", "b"], 2, 5, 2)
    ints = np.array([1, 2])
    kept = {number: sums.upload("a", number, ints) for number in range(10)}
    assert sorted(sums.rounds._open) == list(range(2, 10))
    for number in (0, 1):
        with pytest.raises(Refused, match=f"round {number} was given up"):
            sums.upload("b", number, ints)
    result = sum_uploads(sums, {"a": kept[5], "b": sums.upload("b", 5, ints)}, 5, "ab")
    assert np.array_equal(result.total_P, 2 * ints)
    assert sorted(sums.rounds._open) == [6, 7, 8, 9]


def test_too_few_clients_strangers_and_bad_groups_are_refused():
    sums = MaskedSum(["a", "b", "c"], 2, 5, 3)
    with pytest.raises(Refused, match="'z' is not of this masked sum's group"):
        sums.upload("z", 0, np.array([1, 2]))
    with pytest.raises(Refused, match="'z' is not of this masked sum's group"):
        sums.begin(0).add("z", sums.upload("a", 0, np.array([1, 2])))
    with pytest.raises(Refused, match="at least 2 clients, 1 sent"):
        sum_uploads(sums, {"a": sums.upload("a", 0, np.array([1, 2]))}, 0, "abc")
    assert sorted(sums.rounds._open) == [0]
    for clients, threshold in (
        (["a"], None),
        (["a", "a"], None),
        ("abcd", 2),
        ("abc", 4),
        ("ab", 1),
    ):
        with pytest.raises(Refused):
            MaskedSum(clients, 2, 5, 4, threshold)
    with pytest.raises(Refused, match="minimum_clients"):
        MaskedSum("ab", 2, 5, 4, minimum_clients=3)
    for sizes in ((0, 5, 2), (2, 0, 2), (2, 2**62, 2)):
        with pytest.raises(UserError):
            MaskedSum("ab", *sizes)


def test_nobody_alive_is_nobody():
    sums = MaskedSum(["a", "b", "c"], 5, 10, 3)
    uploads = {name: list(sums.upload(name, 0, np.arange(5))) for name in "abc"}
    round_sum = sums.begin(0)
    for name, chunks in uploads.items():
        round_sum.add(name, chunks)
    for ask in (lambda: sums.check_alive([]), round_sum.pieces, lambda: round_sum.pieces([])):
        with pytest.raises(BelowThreshold, match=r"2 of 3 clients .* 0 alive, missing a, b, c"):
            ask()
    (total,) = round_sum.pieces(["a", "b"])
    assert np.array_equal(total, 3 * np.arange(5))


def test_uploads_of_an_earlier_run_of_the_same_clients_are_refused(monkeypatch):
    identities = {name: Identity.generate(name) for name in "ab"}
    channels = SimulatedChannels()
    for name in "ab":
        channels.key(name)
    monkeypatch.setattr(Identity, "generate", identities.__getitem__)
    first, second = (MaskedSum("ab", 5, 10, 2, channels=channels) for _ in range(2))
    assert first.group.roster == second.group.roster
    old = list(first.upload("a", 0, np.arange(5)))
    round_sum = second.begin(0)
    with pytest.raises(BadMessage, match=r"'a' refused: .*other keys than this run's"):
        round_sum.add("a", old)
    for name in "ab":
        round_sum.add(name, second.upload(name, 0, np.arange(5)))
    (total,) = round_sum.pieces("ab")
    assert np.array_equal(total, 2 * np.arange(5))
    with pytest.raises(Refused, match="named by 16 random bytes, got 3"):
        Group(first.group.roster, 2, run=b"run")


def test_pair_keys_are_those_of_the_pair_the_round_and_the_group():
    one, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    publics = [key.public_key().public_bytes_raw() for key in (one, other)]
    key = pair_key(one, "a", publics[1], "b", b"round")
    assert key == pair_key(other, "b", publics[0], "a", b"round")
    assert key != pair_key(one, "a", publics[1], "b", b"other")
    assert key != pair_key(one, "a", publics[1], "c", b"round")
    with pytest.raises(BadMessage, match="'b' refused: its X25519 key is degenerate"):
        pair_key(one, "a", bytes(32), "b", b"round")


@pytest.mark.parametrize("kind", ["jax", "uint16"])
def test_jax_and_unsigned_integers_are_taken(kind):
    import jax.numpy as jnp

    sums = MaskedSum(["a", "b"], 6, 10, 2)
    ints = jnp.arange(6, dtype=jnp.int32) - 3 if kind == "jax" else np.arange(6, dtype=np.uint16)
    uploads = {name: sums.upload(name, 0, ints) for name in "ab"}
    total = sum_uploads(sums, uploads, 0, "ab").total_P
    assert np.array_equal(total, 2 * np.asarray(ints).astype(int))
