"""What only encryption promises: who can decrypt, what leaves a client, and what a loss costs."""

import functools
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure import BadMessage, BelowThreshold, PlainSum, ThresholdSum, WrongSum
from fedjax_llm.secure.aggregator import Aggregator
from fedjax_llm.secure.bfv import open_bfv
from fedjax_llm.secure.cloud_party import CloudParty
from fedjax_llm.secure.key_ceremony import Group
from fedjax_llm.secure.masks import mask
from fedjax_llm.secure.openfhe_repair import import_openfhe
from fedjax_llm.secure.residues import add, pack, unpack
from fedjax_llm.secure.threshold import run_ceremony
from fedjax_llm.secure.wire import frame, open_message, unframe


def updates(secure_sum, clients="xyz"):
    bound = secure_sum.parameters.max_abs
    rng = np.random.default_rng(7)
    return {c: rng.integers(-bound, bound + 1, secure_sum.count) for c in clients}


def collected(secure_sum, round_number, vectors):
    """The server of a round, with all messages added."""
    server = Aggregator(secure_sum.bfv, secure_sum.key.epoch, round_number, secure_sum.count)
    for client, ints in vectors.items():
        server.add(client, secure_sum.encode_message(client, round_number, ints))
    return server


def body_of(secure_sum, data):
    """The residues of client x's message of round 0."""
    body = open_message("threshold", "x", 0, secure_sum.key.epoch, secure_sum.count, data)
    bfv = secure_sum.bfv
    return unpack(body, 2, bfv.moduli, bfv.parameters.ring_dimension, "x")


def test_every_decrypting_set_from_t_to_n_gives_the_same_sum(three_of_four, new_round):
    vectors = updates(three_of_four)
    clouds = three_of_four.group.clouds
    for size in (3, 4):
        for chosen in itertools.combinations(clouds, size):
            server = collected(three_of_four, new_round(), vectors)
            request = server.request(chosen)
            partials = {
                name: three_of_four._parties[name].partial_decryption(request) for name in chosen
            }
            assert np.array_equal(server.fuse(partials), sum(vectors.values()))


def test_no_coalition_below_the_threshold_decrypts(three_of_four, new_round):
    vectors = updates(three_of_four)
    for size in (1, 2):
        for coalition in itertools.combinations(three_of_four.group.clouds, size):
            server = collected(three_of_four, new_round(), vectors)
            c1 = unframe("decrypt", 4, server.request(coalition), "server")[3]
            # They ignore every rule of CloudParty and use the best weights for their number.
            partials = {
                name: three_of_four._parties[name]._answer(
                    server._round, list(coalition), c1, bytes(32)
                )
                for name in coalition
            }
            with pytest.raises(WrongSum, match="canary"):
                server.fuse(partials)


def test_missing_repeated_or_foreign_answers_give_no_result(three_of_four, new_round):
    server = collected(three_of_four, new_round(), updates(three_of_four))
    chosen = ("a", "b", "d")
    request = server.request(chosen)
    partials = {n: three_of_four._parties[n].partial_decryption(request) for n in chosen}
    for wrong in ({}, {n: partials[n] for n in "ab"}, partials | {"c": partials["a"]}):
        with pytest.raises(WrongSum, match="asked were a, b, d"):
            server.fuse(wrong)
    with pytest.raises(BadMessage, match="'d' refused: its answer is not its own"):
        server.fuse(partials | {"d": partials["a"]})
    with pytest.raises(BadMessage, match="'b' refused"):
        server.fuse(partials | {"b": partials["b"][:-1]})
    assert server.fuse(partials).shape == (three_of_four.count,)


def test_dropouts_cost_only_their_own_contribution(threshold_sum, new_round):
    vectors = updates(threshold_sum)
    expected = {c: v.astype(np.int64) for c, v in vectors.items()}
    clouds = threshold_sum.group.clouds
    for alive in itertools.combinations(clouds, 2):  # one cloud dead before decryption
        round_number = new_round()
        messages = {
            c: threshold_sum.encode_message(c, round_number, v)
            for c, v in vectors.items()
            if c != "y"  # one client dead before upload
        }
        result = threshold_sum.sum(messages, round_number, alive)
        assert np.array_equal(result.total_P, expected["x"] + expected["z"])
        assert {c for c, size in result.bytes_up.items() if size} == set(alive)
        assert set(result.seconds) == {"encrypt", "add", "partial decrypt", "fuse"}


def test_below_the_threshold_says_who_is_missing(threshold_sum, new_round):
    round_number = new_round()
    messages = {
        c: threshold_sum.encode_message(c, round_number, v)
        for c, v in updates(threshold_sum).items()
    }
    with pytest.raises(BelowThreshold, match=r"needs 2 of 3 clouds, 1 alive, missing medical, gen"):
        threshold_sum.sum(messages, round_number, ["finance", "stranger"])
    # Nobody was asked, so that the round can still be decrypted once a cloud is back.
    assert threshold_sum.sum(messages, round_number, ["finance", "general"]).total_P.any()


def test_one_set_and_one_sum_per_round(threshold_sum, new_round):
    round_number, vectors = new_round(), updates(threshold_sum)
    party = threshold_sum._parties["medical"]
    server = collected(threshold_sum, round_number, vectors)
    request = server.request(["medical", "finance"])
    answer = party.partial_decryption(request)
    assert party.partial_decryption(request) == answer  # a lost answer may be fetched again
    assert server.request(["medical", "general"]) == request
    other_set = collected(threshold_sum, round_number, vectors).request(["medical", "general"])
    fewer = collected(threshold_sum, round_number, {"x": vectors["x"], "y": vectors["y"]})
    for second in (other_set, fewer.request(["medical", "finance"])):
        with pytest.raises(Refused, match="would reveal differences"):
            party.partial_decryption(second)
    with pytest.raises(Refused, match="too late"):
        server.add("late", b"")


def test_clouds_refuse_requests_outside_of_the_agreement(three_of_four, new_round):
    vectors = updates(three_of_four)
    party = three_of_four._parties["a"]
    for chosen in (["a", "b"], ["b", "c", "d"], ["a", "b", "eve"], ["a", "a", "b"]):
        server = collected(three_of_four, new_round(), vectors)
        with pytest.raises(Refused, match="decrypts with 3 or more"):
            party.partial_decryption(server.request(chosen))
    one = collected(three_of_four, new_round(), {"x": vectors["x"]})
    with pytest.raises(Refused, match="2 or more clients"):
        party.partial_decryption(one.request(["a", "b", "c"]))
    with pytest.raises(Refused, match="at least 2 clients, 1 sent"):
        three_of_four.sum({"x": b""}, 0, "abcd")
    with pytest.raises(BadMessage, match="the server"):
        party.partial_decryption(b"garbage")


def test_one_cloud_alone_is_never_a_threshold():
    for clouds, threshold in (
        (("a", "b"), 1),
        (("a",), 1),
        (("a", "b"), 3),
        (("a", "a"), 2),
        (("a\nb", "c"), 2),
    ):
        with pytest.raises(Refused):
            Group(clouds, threshold)


def test_duplicate_messages_are_refused(threshold_sum, new_round):
    vectors, round_number = updates(threshold_sum), new_round()
    server = collected(threshold_sum, round_number, {"x": vectors["x"]})
    again = threshold_sum.encode_message("x", round_number, vectors["x"])
    with pytest.raises(BadMessage, match="'x' refused: a second message"):
        server.add("x", again)


def test_keys_of_another_ceremony_are_refused(threshold_sum, new_round):
    round_number, vectors = new_round(), updates(threshold_sum)
    other = ThresholdSum(threshold_sum.group.clouds, 2, threshold_sum.count, 2**15 - 1, 6)
    assert other.key.epoch != threshold_sum.key.epoch
    data = other.encode_message("x", round_number, vectors["x"])
    with pytest.raises(BadMessage, match="other keys"):
        threshold_sum.sum({"x": data}, round_number, ["medical", "finance"])


def test_residues_that_a_hostile_client_chooses_reach_no_result(threshold_sum, new_round):
    """A correct digest around random residues: the canary fails, nothing crashes or is returned."""
    round_number, vectors = new_round(), updates(threshold_sum)
    good = threshold_sum.encode_message("x", round_number, vectors["x"])
    name, numbers, epoch, body = unframe("threshold", 4, good, "x")
    forged = frame("threshold", b"eve", numbers, epoch, body[::-1])
    with pytest.raises((WrongSum, BadMessage)):
        threshold_sum.sum({"x": good, "eve": forged}, round_number, ["medical", "finance"])
    assert name == b"x"


def test_what_leaves_a_client_is_ciphertext(threshold_sum):
    """Fresh randomness, no plaintext in the bytes, and residues uniform for zero and not zero."""
    bound, count = threshold_sum.parameters.max_abs, threshold_sum.count
    ints = np.random.default_rng(0).integers(-bound, bound + 1, count)
    first = threshold_sum.encode_message("x", 0, ints)
    second = threshold_sum.encode_message("x", 0, ints)
    assert len(first) == len(second)
    a, b = body_of(threshold_sum, first), body_of(threshold_sum, second)
    assert (a == b).mean() < 0.001
    for width in ("<i2", "<i4", "<i8"):
        for at in range(count - 3):
            assert ints[at : at + 4].astype(width).tobytes() not in first
    for vector in (np.zeros(count, int), np.full(count, bound), ints):
        residues = body_of(threshold_sum, threshold_sum.encode_message("x", 0, vector))
        for element in residues:
            for row, modulus in zip(element, threshold_sum.bfv.moduli, strict=True):
                bins = np.bincount((row / np.float64(modulus) * 64).astype(int), minlength=64)
                expected = row.size / 64
                # Chi-square with 63 degrees of freedom: 160 is beyond the 1 - 1e-9 quantile.
                assert ((bins - expected) ** 2 / expected).sum() < 160
        slots = residues[0, 0, 1 : count + 1].astype(np.float64)
        if vector.std():
            assert (
                abs(np.corrcoef(slots, vector)[0, 1]) < 0.8
            )  # beyond the 1 - 1e-9 quantile for 50 points


def test_flooding_is_as_wide_as_the_argument_assumes(threshold_sum):
    """Of c_1 = 0 only the error is left; its coefficient 0 is the mean of its evaluations."""
    bfv = threshold_sum.bfv
    size, product = bfv.parameters.ring_dimension, math.prod(bfv.moduli)
    zero = np.zeros((1, len(bfv.moduli), size), np.uint64)
    errors = []
    for _ in range(24):
        answer = bfv.decrypt_partially(threshold_sum._parties["medical"]._share, zero)
        error = 0
        for row, modulus in zip(answer[0], bfv.moduli, strict=True):
            mean = int(row.astype(object).sum()) * pow(size, -1, modulus) % modulus
            rest = product // modulus
            error += mean * rest * pow(rest, -1, modulus)
        error %= product
        errors.append(error - product if error > product // 2 else error)
    half = product // bfv.moduli[0] // 2
    assert half > 2**119
    assert max(map(abs, errors)) <= half + 1
    # 24 uniform draws: each of these fails with a probability below 1e-6.
    assert max(errors) > 0 > min(errors) and max(map(abs, errors)) > half // 2


def coefficient_0(bfv, residues_LN):
    """Of ring elements in evaluation form: the mean of their evaluations, modulo Q, centred."""
    size, product = bfv.parameters.ring_dimension, math.prod(bfv.moduli)
    value = 0
    for row, modulus in zip(residues_LN, bfv.moduli, strict=True):
        rest = product // modulus
        value += int(row.astype(object).sum()) * pow(size * rest, -1, modulus) * rest
    return (value + product // 2) % product - product // 2


def test_an_idle_cloud_and_the_server_learn_nothing_of_the_noise(threshold_sum, new_round):
    """Cloud 3 knows its share; b's is (s + 2 share_3) / 3, so that b's answer would show E mod 3.

    Only coefficient 0 is looked at. What remains must be uniform, not near a multiple of Q / 3.
    """
    bfv, clouds = threshold_sum.bfv, threshold_sum.group.clouds
    product, t = math.prod(bfv.moduli), bfv.parameters.plaintext_modulus
    size, third = bfv.parameters.ring_dimension, pow(3, -1, product)
    idle = threshold_sum._parties[clouds[2]]._share[0]
    near = 0
    for _ in range(8):
        round_number = new_round()
        server = collected(threshold_sum, round_number, updates(threshold_sum))
        request = server.request(clouds[:2])
        answers = {n: threshold_sum._parties[n].partial_decryption(request) for n in clouds[:2]}
        parts = {
            n: unpack(unframe("partial", 4, data, n)[3], 1, bfv.moduli, size, n)
            for n, data in answers.items()
        }
        c0, c1 = server._total[:1], server._total[1:]
        fused = functools.reduce(lambda x, y: add(x, y, bfv.moduli), [c0, *parts.values()])
        message = round(coefficient_0(bfv, fused[0]) * t / product) * product // t
        rows = zip(idle, c1[0], bfv.moduli, strict=True)
        own = np.stack([(i.astype(object) * c % q).astype(np.uint64) for i, c, q in rows])
        left = coefficient_0(bfv, parts[clouds[1]][0])
        left += third * (2 * coefficient_0(bfv, own) - coefficient_0(bfv, c0[0]) + message)
        distance = 3 * left % product
        near += min(distance, product - distance) < product // 2**32
    assert near == 0


def test_masks_cancel_over_the_set_and_differ_by_request(three_of_four):
    bfv, clouds = three_of_four.bfv, ["a", "c", "d"]

    def masks(request, chunk):
        return [
            mask(n, clouds, three_of_four._parties[n]._mask_keys, request, chunk, bfv.moduli, 64)
            for n in clouds
        ]

    first = masks(bytes(32), 0)
    assert not functools.reduce(lambda x, y: add(x, y, bfv.moduli), first).any()
    for one in (*masks(bytes(32), 1), *masks(b"\1" * 32, 0)):
        assert all((one == other).mean() < 0.01 for other in first)


def test_a_forked_process_does_not_encrypt(threshold_sum, monkeypatch):
    """OpenFHE's generator would repeat the parent's noise."""
    zeros = np.zeros(threshold_sum.count, int)
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(Refused, match="before this process was forked"):
        threshold_sum.encode_message("x", 0, zeros)


def test_two_requests_at_once_get_one_answer(threshold_sum, new_round):
    round_number, vectors = new_round(), updates(threshold_sum)
    party = threshold_sum._parties["medical"]
    requests = [
        collected(threshold_sum, round_number, vectors).request(["medical", other])
        for other in ("finance", "general")
    ]

    def answered(request):
        try:
            return bool(party.partial_decryption(request))
        except Refused:
            return False

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(answered, requests)) == 1


def test_a_statement_says_who_may_and_that_it_is_simulated(threshold_sum, three_of_four):
    assert "any 2 of the 3 clouds (medical, finance, general)" in threshold_sum.statement()
    assert "1 or more clients" in threshold_sum.statement()
    assert "2 or more clients" in three_of_four.statement()
    assert "one process plays all parties" in three_of_four.statement()


def test_adding_residues_is_openfhe_s_eval_add(threshold_sum):
    bfv, openfhe = threshold_sum.bfv, import_openfhe()
    one, two = (bfv.encrypt(threshold_sum._public_key, np.arange(9) * factor) for factor in (1, -5))
    as_openfhe = [
        openfhe.DeserializeCiphertextString(bfv._ciphertext.write(c), openfhe.BINARY)
        for c in (one, two)
    ]
    expected = bfv._read(bfv._context.EvalAdd(*as_openfhe), 2)
    assert np.array_equal(add(one, two, bfv.moduli), expected)


def test_plain_and_encrypted_sums_are_bit_identical(threshold_sum, new_round):
    vectors, round_number = updates(threshold_sum), new_round()
    plain = PlainSum(threshold_sum.count, 2**15 - 1, 6)
    totals = [
        kind.sum(
            {c: kind.encode_message(c, round_number, v) for c, v in vectors.items()},
            round_number,
            threshold_sum.group.clouds,
        ).total_P.tobytes()
        for kind in (plain, threshold_sum)
    ]
    assert totals[0] == totals[1]


class TestCeremony:
    @pytest.fixture
    def parties(self, threshold_sum):
        group = Group(("p", "q", "r"), 2)
        return [CloudParty(threshold_sum.bfv, group, name, 2) for name in group.clouds]

    def to_step(self, parties, last):
        sent = {}
        for step in ("hello", "seed", "commit", "share"):
            sent = {
                p.cloud: getattr(p.ceremony, step)(*([sent] if step != "hello" else []))
                for p in parties
            }
            if step == last:
                break
        return sent

    def test_no_key_or_share_stands_in_what_was_relayed(self, threshold_sum, parties):
        bfv = threshold_sum.bfv
        shares = self.to_step(parties, "share")
        secrets = {p.cloud: p.ceremony._secret for p in parties}
        dealt = {p.cloud: p.ceremony.deal(shares) for p in parties}
        relayed = b"".join(data for _, deals in dealt.values() for data in deals.values())
        key = dealt["p"][0]
        for p in parties:
            p.finish(key, {sender: deals[p.cloud] for sender, (_, deals) in dealt.items()})
            for secret in (secrets[p.cloud], p._share):
                assert pack(secret, bfv.moduli)[:64] not in relayed
            # The share is Shamir's of the joint secret, not anybody's own part.
            assert not np.array_equal(p._share, secrets[p.cloud])
            with pytest.raises(Refused, match="already finished"):
                p.ceremony.hello()

    def test_changing_one_s_mind_after_committing_is_refused(self, parties):
        hellos = self.to_step(parties, "hello")
        seeds = {p.cloud: p.ceremony.seed(hellos) for p in parties}
        with pytest.raises(BadMessage, match="'q' refused: its seed is not the one"):
            parties[0].ceremony.commit(seeds | {"q": frame("seed", bytes(32))})
        commitments = {p.cloud: p.ceremony.commit(seeds) for p in parties}
        shares = {p.cloud: p.ceremony.share(commitments) for p in parties}
        with pytest.raises(BadMessage, match="'r' refused: its key share is not the one"):
            parties[0].ceremony.deal(shares | {"r": shares["p"]})
        with pytest.raises(Refused, match="no 'share' message from r"):
            parties[0].ceremony.deal({n: shares[n] for n in "pq"})

    def test_sealed_shares_open_only_for_their_recipient(self, parties):
        shares = self.to_step(parties, "share")
        dealt = {p.cloud: p.ceremony.deal(shares) for p in parties}
        key = dealt["p"][0]
        wrong = {sender: deals["q"] for sender, (_, deals) in dealt.items()}
        with pytest.raises(BadMessage, match="was not dealt to 'p'"):
            parties[0].finish(key, wrong)
        right = {sender: deals["p"] for sender, (_, deals) in dealt.items()}
        sender, recipient, box = unframe("deal", 3, right["q"], "q")
        flipped = frame("deal", sender, recipient, bytes([box[0] ^ 1]) + box[1:])
        with pytest.raises(BadMessage, match="'q' refused: its sealed share does not open"):
            parties[0].finish(key, right | {"q": flipped})

    def test_a_cloud_without_a_share_does_not_answer(self, parties):
        with pytest.raises(Refused, match="holds no key share"):
            parties[0].partial_decryption(b"")

    def test_bytes_are_counted(self, parties):
        key, up, down = run_ceremony(parties)
        assert len(key.epoch) == 16
        assert len(set(up.values())) == 1 and sum(down.values()) >= sum(up.values())


def test_setting_up_on_another_thread_is_refused(threshold_sum):
    caught = []

    def attempt():
        try:
            open_bfv(threshold_sum.parameters)
        except UserError as err:
            caught.append(err)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


@pytest.mark.parametrize(
    ("bits", "summands", "parties"), [(8, 4, 2), (14, 16, 3), (24, 3, 5), (30, 500, 2)]
)
def test_other_sizes_are_exact_too(bits, summands, parties):
    names = [f"cloud {i}" for i in range(parties)]
    bound = 2 ** (bits - 1) - 1
    secure_sum = ThresholdSum(names, parties, 300, bound, summands)
    rng = np.random.default_rng(bits)
    vectors = {f"c{i}": rng.integers(-bound, bound + 1, 300) for i in range(3)}
    for ints in vectors.values():
        ints[:100] = bound
    messages = {c: secure_sum.encode_message(c, 0, v) for c, v in vectors.items()}
    assert np.array_equal(secure_sum.sum(messages, 0, names).total_P, sum(vectors.values()))
