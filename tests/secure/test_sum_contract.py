"""What every kind of sum keeps: exact, in any order, of any subset, or refused by name.

After every refusal the round goes on: it must still give the exact sum of those who sent what they
should, which is how these tests see that nothing of a refused upload has been added.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure.channels import SimulatedChannels
from fedjax_llm.secure.fixed_point import FixedPoint
from fedjax_llm.secure.intake import Upload
from fedjax_llm.secure.plain import PlainSum
from fedjax_llm.secure.sums import (
    BadMessage,
    BelowThreshold,
    NoAnswer,
    WrongSum,
    collect,
    sum_uploads,
)
from fedjax_llm.secure.wire import Header, UploadWriter

CLIENTS = ("ann", "bob", "cat", "dan", "eve", "fay")
BOUND = 2**15 - 1
FEW = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MANY = settings(max_examples=100, deadline=None)


def vector(secure_sum, seed):
    """Random integers with the extremes in front."""
    ints = np.random.default_rng(seed).integers(-BOUND, BOUND + 1, secure_sum.count)
    ints[:4] = BOUND, -BOUND, 0, BOUND
    return ints


def vectors(secure_sum, clients):
    return {client: vector(secure_sum, seed) for seed, client in enumerate(clients)}


def summed(case, secure_sum, round_number, sent, alive=None):
    """Uploads in the given order, then the total."""
    round_sum = secure_sum.begin(round_number)
    for client, ints in sent.items():
        round_sum.add(client, secure_sum.upload(client, round_number, ints))
    return collect(round_sum, case.helpers if alive is None else alive)


class Attacked:
    """A round with ann and cat in it, into which bob's upload is to come, and then comes."""

    def __init__(self, case, secure_sum, round_number):
        self.case, self.sum, self.number = case, secure_sum, round_number
        self.vectors = vectors(secure_sum, ("ann", "bob", "cat"))
        self.round = secure_sum.begin(round_number)
        self.round.add("ann", self.upload("ann"))
        self.round.add("cat", self.upload("cat"))
        self.good = list(self.upload("bob"))

    def upload(self, client):
        return self.sum.upload(client, self.number, self.vectors[client])

    def refuses(self, upload, match, client="bob", kind=BadMessage):
        with pytest.raises(kind, match=match) as caught:
            self.round.add(client, upload)
        assert "\n" not in str(caught.value)
        if kind is BadMessage:
            assert caught.value.sender == client
        assert self.round.participants == ("ann", "cat")

    def completes(self):
        self.round.add("bob", self.good)
        result = collect(self.round, self.case.helpers)
        assert np.array_equal(result.total_P, sum(self.vectors.values()))
        assert result.participants == ("ann", "bob", "cat")


@pytest.fixture
def attacked(case, new_round):
    return Attacked(case, case.small, new_round())


@pytest.fixture
def attacked_large(case, new_round):
    return Attacked(case, case.large, new_round())


@FEW
@given(st.data())
def test_exact_for_any_subset_of_clients_and_any_integers(case, new_round, data):
    entry = st.one_of(st.sampled_from([-BOUND, BOUND, 0]), st.integers(-BOUND, BOUND))
    sent = data.draw(st.lists(st.sampled_from(CLIENTS), min_size=2, unique=True))
    inputs = {}
    for client in sent:
        ints = np.full(case.small.count, data.draw(entry), np.int64)
        some = data.draw(st.lists(entry, max_size=12))
        ints[: len(some)] = some
        inputs[client] = ints
    result = summed(case, case.small, new_round(), inputs)
    assert result.total_P.dtype == np.int64
    assert np.array_equal(result.total_P, sum(inputs.values()))
    assert result.participants == tuple(sorted(sent))


def test_all_clients_at_both_extremes(case, new_round):
    for sign in (1, -1):
        ints = np.full(case.small.count, sign * BOUND)
        result = summed(case, case.small, new_round(), dict.fromkeys(CLIENTS, ints))
        assert np.array_equal(result.total_P, len(CLIENTS) * ints)


def test_several_chunks_are_exact_and_small(case, new_round):
    secure_sum, number = case.large, new_round()
    sent = vectors(secure_sum, CLIENTS[:3])
    round_sum = secure_sum.begin(number)
    for client, ints in sent.items():
        chunks = list(secure_sum.upload(client, number, ints))
        assert len(chunks) > 1
        assert max(map(len, chunks)) < 2 * 2**20
        assert sum(map(len, chunks)) == secure_sum.upload_bytes(client)
        round_sum.add(client, chunks)
    pieces = list(round_sum.pieces(case.helpers))
    assert {piece.dtype for piece in pieces} == {np.dtype(np.int64)}
    assert np.array_equal(np.concatenate(pieces), sum(sent.values()))


def test_sums_are_linear(case, new_round):
    rng = np.random.default_rng(1)
    x, y = (
        {c: rng.integers(-BOUND // 2 + 1, BOUND // 2, case.small.count) for c in CLIENTS[:3]}
        for _ in range(2)
    )
    both = {client: x[client] + y[client] for client in x}
    totals = [summed(case, case.small, new_round(), sent).total_P for sent in (x, y, both)]
    assert np.array_equal(totals[0] + totals[1], totals[2])


def test_order_of_clients_does_not_matter(case, new_round):
    inputs = vectors(case.small, CLIENTS[:3])
    results = [
        summed(case, case.small, new_round(), {c: inputs[c] for c in order})
        for order in itertools.islice(itertools.permutations(inputs), 0, None, 2)
    ]
    assert len({(r.total_P.tobytes(), r.participants) for r in results}) == 1


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint16, np.int64, np.uint64])
def test_integer_types_do_not_matter(case, new_round, dtype):
    ints = np.arange(case.small.count).astype(dtype)
    if np.iinfo(dtype).min < 0:
        ints -= 20
    ints.flags.writeable = False
    strided = np.repeat(ints, 2)[::2]
    total = summed(case, case.small, new_round(), {"ann": ints, "bob": strided}).total_P
    assert np.array_equal(total, 2 * ints.astype(np.int64))


def test_jax_arrays_are_integers_too(case, new_round):
    inputs = vectors(case.small, CLIENTS[:2])
    sent = {c: jnp.asarray(ints.astype(np.int32)) for c, ints in inputs.items()}
    total = summed(case, case.small, new_round(), sent).total_P
    assert np.array_equal(total, sum(inputs.values()))


def test_all_kinds_give_the_same_bits_and_take_no_other_kind_s_uploads(all_cases, new_round):
    number, inputs, results, uploads = new_round(), {}, [], {}
    for case in all_cases:
        inputs = vectors(case.small, CLIENTS[:4])
        uploads[case.kind] = {
            client: list(case.small.upload(client, number, ints)) for client, ints in inputs.items()
        }
    for case, other in zip(all_cases, [*all_cases[1:], all_cases[0]], strict=True):
        round_sum = case.small.begin(number)
        with pytest.raises(BadMessage, match=f"of kind {other.kind}, expected {case.kind}"):
            round_sum.add("ann", uploads[other.kind]["ann"])
        for client, chunks in uploads[case.kind].items():
            round_sum.add(client, chunks)
        results.append(collect(round_sum, case.helpers))
    assert {r.total_P.tobytes() for r in results} == {sum(inputs.values()).tobytes()}
    assert {r.participants for r in results} == {CLIENTS[:4]}


def test_overflow_and_wrong_vectors_are_refused_before_anything_is_sent(case, new_round):
    secure_sum, number = case.small, new_round()
    for value in (BOUND + 1, -BOUND - 1, -(2**31), 2**62, -(2**63), 2**64 - 1):
        ints = np.zeros(secure_sum.count, np.uint64 if value > 2**63 else np.int64)
        ints[7] = value
        with pytest.raises(Refused, match=rf"client 'ann': entry 7 is {value}, beyond"):
            secure_sum.upload("ann", number, ints)
    count = secure_sum.count
    for wrong in (
        np.zeros(count),
        np.zeros(count, bool),
        np.zeros(count, object),
        np.zeros(count, np.complex64),
        np.zeros(count + 1, int),
        np.zeros(count - 1, int),
        np.zeros((1, count), int),
        np.int64(3),
        [],
    ):
        with pytest.raises(Refused, match="'ann' must send 50 integers"):
            secure_sum.upload("ann", number, wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.01])
def test_values_without_an_encoding_are_refused_by_name(case, new_round, value):
    codec = FixedPoint(16, 1.0, 6)
    assert codec.max_int == case.small.max_abs
    x_P = np.zeros(case.small.count, np.float32)
    x_P[3] = value
    with pytest.raises(Refused, match="client 'ann': entry 3 is "):
        case.small.upload("ann", new_round(), codec.encode(jnp.asarray(x_P)))


@pytest.mark.parametrize("number", [-1, 2**63, 0.5])
def test_rounds_that_are_no_rounds_are_refused(case, number):
    with pytest.raises(Refused, match="round number"):
        case.small.upload("ann", number, np.zeros(case.small.count, int))
    with pytest.raises(Refused, match="round number"):
        case.small.begin(number)


@pytest.mark.parametrize("name", ["", "x" * 256, "two\nlines"])
def test_names_that_are_no_names_are_refused(attacked, name):
    with pytest.raises(Refused):
        attacked.sum.upload(name, attacked.number, np.zeros(attacked.sum.count, int))
    with pytest.raises(Refused):
        attacked.round.add(name, attacked.good)
    attacked.completes()


def test_upload_bytes_are_counted_exactly(case, new_round):
    names = CLIENTS if case.kind == "masked" else ("a", "zoë", "n" * 255)
    for client in names:
        chunks = case.small.upload(client, new_round(), np.zeros(case.small.count, int))
        assert sum(map(len, chunks)) == case.small.upload_bytes(client)


def test_wrong_round_client_and_keys_are_refused_by_name(attacked, case, new_round):
    later, ints = new_round(), attacked.vectors["bob"]
    late = list(attacked.sum.upload("bob", later, ints))
    attacked.refuses(late, f"belongs to round {later}, this is {attacked.number}")
    attacked.refuses(attacked.upload("ann"), "written by 'ann'")
    foreign = case.other.upload("bob", attacked.number, ints)
    # Under the same name and round, by somebody with the keys of another run.
    attacked.refuses(foreign, "other keys|damaged or forged")
    attacked.completes()


@pytest.mark.parametrize("error", [None, ConnectionError("gone")])
def test_an_upload_that_breaks_off_costs_nothing(attacked_large, error):
    def breaks_off(chunks):
        yield from attacked_large.good[:chunks]
        if error is not None:
            raise error

    total = len(attacked_large.good)
    for chunks in {0, 1, total - 1}:
        if error is None:
            attacked_large.refuses(breaks_off(chunks), f"it ended after {chunks} of {total}")
        else:
            with pytest.raises(ConnectionError):
                attacked_large.round.add("bob", breaks_off(chunks))
    attacked_large.completes()


def test_tampered_truncated_and_invented_bytes_are_refused_by_name(attacked):
    good = attacked.good

    @MANY
    @given(st.data())
    def attack(data):
        at = data.draw(st.integers(0, len(good) - 1))
        chunk = good[at]
        changed = bytearray(chunk)
        changed[data.draw(st.integers(0, len(chunk) - 1))] ^= data.draw(st.integers(1, 255))
        cut = chunk[: data.draw(st.integers(0, len(chunk) - 1))]
        for wrong in (bytes(changed), cut, chunk + b"\0", data.draw(st.binary(max_size=200))):
            attacked.refuses([*good[:at], wrong, *good[at + 1 :]], "'bob' refused")

    attack()
    attacked.completes()


def test_replayed_reordered_and_missing_chunks_are_refused_by_name(attacked_large):
    good = attacked_large.good
    again, others = (list(attacked_large.upload(client)) for client in ("bob", "ann"))
    pool = [*good, *again, *others]
    accepted = (list(range(len(good))), list(range(len(good), 2 * len(good))))

    @MANY
    @given(st.data())
    def attack(data):
        if data.draw(st.booleans()):
            chosen = data.draw(st.permutations(accepted[0]))
        else:
            # Right at first, then anything.
            chosen = accepted[0][: data.draw(st.integers(0, len(good)))]
            chosen += data.draw(st.lists(st.sampled_from(range(len(pool))), max_size=len(good)))
        if chosen not in accepted:
            attacked_large.refuses((pool[i] for i in chosen), "'bob' refused")

    attack()
    attacked_large.refuses([*good, good[-1]], "goes on after")
    attacked_large.refuses([again[0], *good[1:]], "another upload")
    attacked_large.completes()


def test_content_that_no_honest_client_sends_gives_no_wrong_total(case, new_round):
    """With the right MAC, as a hostile client can make it."""
    rng = np.random.default_rng(2)
    for of in range(2):
        attack = Attacked(case, case.small, new_round())
        first = attack.good[0]
        header = Header(
            case.kind, first[8:24], first[24:40], attack.number, attack.sum.count, "bob"
        )
        writer = UploadWriter(header, case.channels.key("bob"), len(attack.good))
        front = 90 + len("bob")
        payloads = [chunk[front:-16] for chunk in attack.good]
        spoilt = payloads[-of]
        # Beyond any bound, where somebody looks at single integers; garbage for the others.
        lowest = b"\0\x80" * (len(spoilt) // 2)  # -2^15
        payloads[-of] = lowest if case.kind == "plain" else rng.bytes(len(spoilt))
        try:
            attack.round.add("bob", [writer.write(payload) for payload in payloads])
        except BadMessage as err:
            assert err.sender == "bob"  # noqa: PT017
            attack.completes()
        else:
            with pytest.raises(WrongSum):
                collect(attack.round, case.helpers)


@pytest.mark.parametrize("error", [OSError(5, "disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1])
def test_a_round_that_breaks_off_while_adding_gives_no_total(
    attacked_large, new_round, monkeypatch, error, after
):
    """Half an upload may be in the sum, which nobody can take out again."""
    attack, case, real = attacked_large, attacked_large.case, Upload.payloads

    def breaks_off(received):
        yield from itertools.islice(real(received), after)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Upload, "payloads", breaks_off)
        with pytest.raises(type(error)):
            attack.round.add("bob", attack.good)
    spoilt = f"round {attack.number} broke off while adding 'bob'; start it anew"
    for client, upload in (("bob", attack.good), ("dan", iter(()))):
        attack.refuses(upload, spoilt, client, Refused)
    with pytest.raises(Refused, match=spoilt):
        collect(attack.round, case.helpers)
    again = Attacked(case, attack.sum, new_round())
    again.completes()


def test_an_upload_during_which_another_one_breaks_off_is_refused(attacked_large, monkeypatch):
    attack = attacked_large
    other = list(attack.sum.upload("dan", attack.number, attack.vectors["bob"]))

    def breaks_off(_):
        raise OSError(5, "disk")

    def meanwhile():
        yield from attack.good[:-1]
        with monkeypatch.context() as patch:
            patch.setattr(Upload, "payloads", breaks_off)
            with pytest.raises(OSError, match="disk"):
                attack.round.add("dan", other)
        yield attack.good[-1]

    attack.refuses(meanwhile(), "broke off while adding 'dan'", kind=Refused)
    with pytest.raises(Refused, match="broke off while adding 'dan'"):
        collect(attack.round, attack.case.helpers)


def test_a_second_upload_is_refused(attacked):
    attacked.round.add("bob", attacked.good)
    for upload in (attacked.good, list(attacked.upload("bob"))):
        with pytest.raises(BadMessage, match="'bob' refused: a second upload"):
            attacked.round.add("bob", upload)
    result = collect(attacked.round, attacked.case.helpers)
    assert np.array_equal(result.total_P, sum(attacked.vectors.values()))


def test_more_clients_than_planned_are_refused(attacked_large):
    """The first three are all that a large sum is exact for."""
    ints = attacked_large.vectors["ann"]
    attacked_large.round.add("bob", attacked_large.good)
    with pytest.raises(Refused, match="'dan' is one too many: the sum is exact up to 3"):
        attacked_large.round.add(
            "dan", attacked_large.sum.upload("dan", attacked_large.number, ints)
        )
    result = collect(attacked_large.round, attacked_large.case.helpers)
    assert np.array_equal(result.total_P, sum(attacked_large.vectors.values()))


def test_fewer_clients_than_agreed_are_not_summed_until_more_come(case, new_round):
    secure_sum, number = case.small, new_round()
    inputs = vectors(secure_sum, CLIENTS[:2])
    round_sum = secure_sum.begin(number)
    for client, ints in inputs.items():
        with pytest.raises(Refused, match=r"at least 2 clients, [01] sent"):
            collect(round_sum, case.helpers)
        round_sum.add(client, secure_sum.upload(client, number, ints))
    assert np.array_equal(collect(round_sum, case.helpers).total_P, sum(inputs.values()))


def test_round_numbers_rise_and_serve_once(case, new_round):
    before, number = new_round(), new_round()
    inputs = vectors(case.small, CLIENTS[:3])
    uploads = {c: list(case.small.upload(c, number, ints)) for c, ints in inputs.items()}
    first, second = (case.small.begin(number) for _ in range(2))
    for client in inputs:
        first.add(client, uploads[client])
    for client in ("ann", "bob"):
        second.add(client, uploads[client])
    total = collect(first, case.helpers).total_P
    assert np.array_equal(total, sum(inputs.values()))
    # Two totals of one round would show the difference, here cat's integers.
    with pytest.raises(Refused):
        collect(second, case.helpers)
    for old in (before, number):
        with pytest.raises(Refused, match=rf"round {old} is over: .* use a larger round number"):
            case.small.begin(old)
    with pytest.raises(Refused, match="'dan' is too late"):
        first.add("dan", uploads["ann"])


def test_clients_that_drop_out_cost_their_own_contribution_only(case, new_round):
    """Before the upload, in its middle, and after it."""
    secure_sum, number = case.small, new_round()
    inputs = vectors(secure_sum, CLIENTS)
    round_sum = secure_sum.begin(number)
    for client, ints in inputs.items():
        chunks = list(secure_sum.upload(client, number, ints))
        if client == "ann":
            continue
        if client == "bob":
            with pytest.raises(BadMessage, match="it ended after"):
                round_sum.add(client, chunks[:-1])
            continue
        round_sum.add(client, chunks)
    gone = {"ann", "cat"}  # cat has uploaded, and helps no more
    result = collect(round_sum, [name for name in case.helpers if name not in gone])
    assert result.participants == CLIENTS[2:]
    assert np.array_equal(result.total_P, sum(inputs[c] for c in CLIENTS[2:]))


def test_any_helpers_from_the_threshold_on_are_enough(helped, new_round):
    inputs = vectors(helped.small, CLIENTS[:3])
    for missing in itertools.combinations(helped.helpers, len(helped.helpers) - helped.threshold):
        alive = [name for name in helped.helpers if name not in missing]
        result = summed(helped, helped.small, new_round(), inputs, alive)
        assert np.array_equal(result.total_P, sum(inputs.values()))
        if helped.kind == "masked":
            continue  # its clients have dealt shares before
        assert {name for name, size in result.bytes_up.items() if size} == set(alive)


def test_too_few_helpers_are_named_and_nothing_is_lost(helped, new_round):
    number = new_round()
    inputs = vectors(helped.small, CLIENTS[:3])
    round_sum = helped.small.begin(number)
    for client, ints in inputs.items():
        round_sum.add(client, helped.small.upload(client, number, ints))
    alive = [*helped.helpers[: helped.threshold - 1], "a stranger"]
    missing = ", ".join(helped.helpers[helped.threshold - 1 :])
    with pytest.raises(BelowThreshold, match=missing):
        collect(round_sum, alive)
    with pytest.raises(BelowThreshold, match=missing):
        helped.small.check_alive(alive)
    helped.small.check_alive(helped.helpers)
    assert np.array_equal(collect(round_sum, helped.helpers).total_P, sum(inputs.values()))


@pytest.mark.parametrize("step", [0, 1])
def test_a_helper_that_dies_meanwhile_is_replaced(helped, new_round, monkeypatch, step):
    """Before it has agreed to the set, and after it has, which is when its part is missing."""
    number = new_round()
    inputs = vectors(helped.small, CLIENTS[:3])
    round_sum = helped.small.begin(number)
    for client, ints in inputs.items():
        round_sum.add(client, helped.small.upload(client, number, ints))
    names = ("consent", "reveal") if helped.kind == "masked" else ("agree", "partial_decryption")
    silenced = helped.helpers[0]
    asked = []

    def silent(*_):
        asked.append(silenced)
        raise NoAnswer(silenced)

    monkeypatch.setattr(helped.parties(helped.small, number)[silenced], names[step], silent)
    result = collect(round_sum, helped.helpers)
    assert asked
    assert np.array_equal(result.total_P, sum(inputs.values()))


def test_when_too_many_helpers_die_meanwhile_nothing_is_returned(helped, new_round, monkeypatch):
    number = new_round()
    inputs = vectors(helped.small, CLIENTS[:3])
    round_sum = helped.small.begin(number)
    for client, ints in inputs.items():
        round_sum.add(client, helped.small.upload(client, number, ints))
    name = "reveal" if helped.kind == "masked" else "partial_decryption"
    parties = helped.parties(helped.small, number)
    with monkeypatch.context() as patch:
        for silenced in helped.helpers[: len(helped.helpers) - helped.threshold + 1]:

            def silent(_, silenced=silenced):
                raise NoAnswer(silenced)

            patch.setattr(parties[silenced], name, silent)
        with pytest.raises(BelowThreshold):
            collect(round_sum, helped.helpers)
    # They come back, and the same uploads do.
    assert np.array_equal(collect(round_sum, helped.helpers).total_P, sum(inputs.values()))


def test_statement_is_one_line(case):
    assert case.small.statement()
    assert "\n" not in case.small.statement()
    assert case.small.kind == case.kind
    sizes = (case.small.count, case.small.max_abs, case.small.summands, case.small.minimum_clients)
    assert sizes == (50, BOUND, 6, 2)


def test_costs_are_filled_in(case, new_round):
    number = new_round()
    inputs = vectors(case.small, CLIENTS[:2])
    uploads = {c: case.small.upload(c, number, ints) for c, ints in inputs.items()}
    result = sum_uploads(case.small, uploads, number, case.helpers)
    assert np.array_equal(result.total_P, sum(inputs.values()))
    stages = {"add"} if case.kind == "plain" else {"add", "decrypt", "unmask"}
    assert set(result.seconds) == stages
    assert all(spent > 0 for spent in result.seconds.values())
    for counted in (result.bytes_up, result.bytes_down):
        assert set(counted) == set(case.helpers)
        assert sum(size > 0 for size in counted.values()) >= case.threshold


@pytest.mark.parametrize(("count", "summands"), [(0, 6), (-1, 6), (50, 0), (50, 2**62)])
def test_impossible_plans_are_refused(case, count, summands):
    with pytest.raises(UserError):
        case.make(count, summands, None)


@pytest.mark.parametrize(
    ("bits", "width"), [(2, 2), (8, 2), (16, 2), (17, 4), (24, 4), (32, 4), (33, 8), (60, 8)]
)
def test_plain_integers_take_the_narrowest_width_and_are_exact(bits, width):
    bound = 2 ** (bits - 1) - 1
    plain = PlainSum(9, bound, 8)
    ints = np.array([bound, -bound, 0, 1, -1, 0, 0, 0, bound])
    assert plain.upload_bytes("a") - PlainSum(1, bound, 8).upload_bytes("a") == 8 * width
    uploads = {f"c{i}": plain.upload(f"c{i}", 0, ints) for i in range(8)}
    assert np.array_equal(sum_uploads(plain, uploads, 0).total_P, 8 * ints)


def test_plain_sums_of_other_things_take_no_uploads_of_each_other():
    channels = SimulatedChannels()
    sums = [PlainSum(3, 9, 2, channels=channels, named=named) for named in (b"", b"a", b"b")]
    for made, other in itertools.permutations(sums, 2):
        with pytest.raises(BadMessage, match="other parameters"):
            other.begin(0).add("ann", made.upload("ann", 0, np.arange(3)))
