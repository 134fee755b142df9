"""Selective encryption: the same sum, both parts or none, and words that say what is open."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure.channels import (
    Channels,
    ClientChannel,
    ServerChannels,
    SimulatedChannels,
    new_run,
)
from fedjax_llm.secure.identity import Identity, Roster
from fedjax_llm.secure.intake import Upload
from fedjax_llm.secure.masked import MaskedSum
from fedjax_llm.secure.plain import PlainSum
from fedjax_llm.secure.selection import Block, Selection, by_layers, by_sensitivity
from fedjax_llm.secure.selective import SelectiveSum
from fedjax_llm.secure.sums import BadMessage, BelowThreshold, SecureSum, collect, sum_uploads
from fedjax_llm.secure.threshold import ThresholdSum

CLIENTS = ("ann", "bob", "cyd")
MAX_ABS = 2**15 - 1
BLOCKS = tuple(
    Block(f"layers.{k}.{name}.lora_B", (3, 7)) for name in ("mlp.down", "attn.o") for k in range(4)
)
SIZE = sum(block.size for block in BLOCKS)
HALF = by_layers(BLOCKS, ["*attn.o*", "layers.2.mlp.*"])


def ints(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(-MAX_ABS, MAX_ABS + 1, size)


def over(hidden: type, selection: Selection = HALF) -> SelectiveSum:
    count = selection.encrypted
    if hidden is ThresholdSum:
        inner: SecureSum = ThresholdSum(
            CLIENTS, 2, count=count, max_abs=MAX_ABS, summands=3, minimum_clients=2
        )
    elif hidden is MaskedSum:
        inner = MaskedSum(CLIENTS, count, MAX_ABS, 3)
    else:
        inner = PlainSum(count, MAX_ABS, 3, 2)
    return SelectiveSum(inner, selection)


@pytest.fixture(scope="module", params=[PlainSum, MaskedSum, ThresholdSum])
def hidden(request: pytest.FixtureRequest) -> type:
    return request.param


def test_the_sum_is_that_of_the_integers(hidden: type) -> None:
    """Any subset, and as many bytes as announced."""
    secure_sum = over(hidden)
    for number, clients in enumerate([CLIENTS, CLIENTS[:2], CLIENTS[1:]]):
        vectors = {name: ints(seed) for seed, name in enumerate(clients)}
        uploads = {
            name: list(secure_sum.upload(name, number, vector)) for name, vector in vectors.items()
        }
        for name, chunks in uploads.items():
            assert sum(map(len, chunks)) == secure_sum.upload_bytes(name)
        result = sum_uploads(secure_sum, uploads, number, clients)
        assert result.participants == clients
        np.testing.assert_array_equal(result.total_P, sum(vectors.values()))
        assert result.seconds["add"] > 0


@given(
    mask=st.lists(st.booleans(), min_size=2, max_size=40).filter(lambda m: 0 < sum(m) < len(m)),
    cuts=st.lists(st.integers(0, 40), max_size=6),
)
def test_pieces_come_in_order_whatever_the_mask(mask: list[bool], cuts: list[int]) -> None:
    """Also when the encrypted part comes in pieces of odd lengths, empty ones included."""
    selection = Selection(np.array(mask), (Block("x", (len(mask),)),), "test")
    secure_sum = over(PlainSum, selection)
    vectors = [ints(seed, len(mask)) for seed in range(2)]
    round_sum = secure_sum.begin(0)
    for name, vector in zip(CLIENTS, vectors, strict=False):
        round_sum.add(name, secure_sum.upload(name, 0, vector))
    inner = round_sum._hidden

    class Chopped:
        costs, participants = inner.costs, inner.participants

        def pieces(self, alive: Iterable[str] = ()) -> Iterable[np.ndarray]:
            return iter(np.split(collect(inner, CLIENTS).total_P, sorted(cuts)))

    round_sum._hidden = Chopped()  # type: ignore[assignment]
    pieces = list(round_sum.pieces())
    assert all(piece.dtype == np.int64 for piece in pieces)
    np.testing.assert_array_equal(np.concatenate(pieces), sum(vectors))


def damaged(chunks: list[bytes], index: int) -> list[bytes]:
    broken = bytearray(chunks[index])
    broken[-40] ^= 1
    return [*chunks[:index], bytes(broken), *chunks[index + 1 :]]


DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "first part": lambda chunks: damaged(chunks, 0),
    "second part": lambda chunks: damaged(chunks, 1),
    "last chunk": lambda chunks: damaged(chunks, len(chunks) - 1),
    "without the second part": lambda chunks: chunks[:1],
    "without the first part": lambda chunks: chunks[1:],
    "one chunk short": lambda chunks: chunks[:-1],
    "nothing": lambda chunks: [],
    "turned": lambda chunks: [*chunks[1:], chunks[0]],
    "twice the first part": lambda chunks: [chunks[0], *chunks],
    "a chunk too many": lambda chunks: [*chunks, chunks[-1]],
    "rubbish": lambda chunks: [b"rubbish"],
}


@pytest.mark.parametrize("what", DAMAGE)
def test_both_parts_are_added_or_neither(hidden: type, what: str) -> None:
    secure_sum = over(hidden)
    good = {name: list(secure_sum.upload(name, 3, ints(k))) for k, name in enumerate(CLIENTS)}
    round_sum = secure_sum.begin(3)
    round_sum.add("ann", good["ann"])
    with pytest.raises(BadMessage) as caught:
        round_sum.add("bob", DAMAGE[what](good["bob"]))
    assert caught.value.sender == "bob"
    assert round_sum.participants == ("ann",)
    # Heard again, with the sound upload; and once only.
    round_sum.add("bob", good["bob"])
    with pytest.raises(BadMessage, match="second"):
        round_sum.add("bob", good["bob"])
    np.testing.assert_array_equal(collect(round_sum, CLIENTS).total_P, ints(0) + ints(1))


@pytest.mark.parametrize("error", [OSError(5, "disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", ["hidden", "clear"])
def test_a_round_that_breaks_off_in_either_part_or_between_them_gives_no_total(
    hidden: type, failing: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read back first is the hidden part."""
    secure_sum = over(hidden)
    good = {name: list(secure_sum.upload(name, 3, ints(k))) for k, name in enumerate(CLIENTS)}
    round_sum = secure_sum.begin(3)
    round_sum.add("ann", good["ann"])
    reads, real = iter(("hidden", "clear")), Upload.payloads

    def breaks_off(received: Upload) -> Iterator[memoryview]:
        if next(reads) == failing:
            raise error
        return real(received)

    with monkeypatch.context() as patch:
        patch.setattr(Upload, "payloads", breaks_off)
        with pytest.raises(type(error)):
            round_sum.add("bob", good["bob"])
    for name in ("bob", "cyd"):
        with pytest.raises(Refused, match="round 3 broke off while adding 'bob'"):
            round_sum.add(name, good[name])
    with pytest.raises(Refused, match="round 3 broke off while adding 'bob'"):
        collect(round_sum, CLIENTS)


def test_parts_with_other_participants_give_no_total() -> None:
    """As when an interruption comes after the one part was added and before the other is."""
    secure_sum = over(PlainSum)
    round_sum = secure_sum.begin(0)
    for k, name in enumerate(CLIENTS[:2]):
        round_sum.add(name, secure_sum.upload(name, 0, ints(k)))
    round_sum._hidden.add("cyd", secure_sum._hidden.upload("cyd", 0, ints(2, HALF.encrypted)))
    for call in (lambda: collect(round_sum), lambda: round_sum.add("cyd", [])):
        with pytest.raises(Refused, match="broke off while adding 'cyd': one part"):
            call()


def test_an_upload_for_another_selection_of_the_same_size_is_refused() -> None:
    channels, size = SimulatedChannels(), 20
    mask_P = np.arange(size) % 2 == 0

    def made(mask_P: np.ndarray) -> SelectiveSum:
        selection = Selection(mask_P, (Block("x", mask_P.shape),), "test")
        inner = PlainSum(selection.encrypted, MAX_ABS, 3, 2, channels=channels)
        return SelectiveSum(inner, selection, channels)

    ours, same, theirs = made(mask_P), made(mask_P.copy()), made(~mask_P)
    round_sum = ours.begin(0)
    with pytest.raises(BadMessage, match="other parameters"):
        round_sum.add("ann", theirs.upload("ann", 0, np.arange(size)))
    assert round_sum.participants == ()
    for name in CLIENTS:
        round_sum.add(name, same.upload(name, 0, np.arange(size)))
    np.testing.assert_array_equal(collect(round_sum).total_P, 3 * np.arange(size))


def test_a_selection_is_named_by_its_mask_and_length() -> None:
    masks = [[1, 0], [0, 1], [1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]]
    found = set()
    for mask in masks:
        chosen = Selection(np.array(mask, bool), (Block("x", (len(mask),)),), "test")
        assert chosen.digest == chosen.digest and len(chosen.digest) == 32
        found.add(chosen.digest)
    assert len(found) == len(masks)


def test_both_parts_are_under_the_keys_of_the_channels_that_are_given() -> None:
    """Between processes, which share no simulated keys."""
    server, ann, bob = (Identity.generate(name) for name in ("server", "ann", "bob"))
    run = new_run()

    def of(channels: Channels) -> SelectiveSum:
        inner = PlainSum(HALF.encrypted, MAX_ABS, 3, 2, channels=channels)
        return SelectiveSum(inner, HALF, channels)

    round_sum = of(ServerChannels(server, Roster([ann.public, bob.public]), run)).begin(0)
    for k, own in enumerate((ann, bob)):
        client = of(ClientChannel(own, server.public, run))
        round_sum.add(own.name, client.upload(own.name, 0, ints(k)))
    np.testing.assert_array_equal(collect(round_sum).total_P, ints(0) + ints(1))


def test_an_upload_of_another_round_or_client_is_refused(hidden: type) -> None:
    secure_sum = over(hidden)
    round_sum = secure_sum.begin(5)
    with pytest.raises(BadMessage, match="belongs to round 4"):
        round_sum.add("ann", secure_sum.upload("ann", 4, ints(0)))
    with pytest.raises(BadMessage, match="written by 'bob'"):
        round_sum.add("ann", secure_sum.upload("bob", 5, ints(0)))
    assert round_sum.participants == ()


def test_a_client_that_breaks_off_costs_nothing_else(hidden: type) -> None:
    secure_sum = over(hidden)
    round_sum = secure_sum.begin(0)

    def breaks_off() -> Iterable[bytes]:
        yield from list(secure_sum.upload("ann", 0, ints(0)))[:-1]
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        round_sum.add("ann", breaks_off())
    for k, name in enumerate(CLIENTS):
        round_sum.add(name, secure_sum.upload(name, 0, ints(k)))
    total = collect(round_sum, CLIENTS).total_P
    np.testing.assert_array_equal(total, sum(ints(k) for k in range(3)))


def test_a_value_beyond_the_bound_is_named_by_its_place_in_the_message(hidden: type) -> None:
    secure_sum = over(hidden)
    for place in (0, SIZE - 1):
        vector = ints(0)
        vector[place] = MAX_ABS + 1
        with pytest.raises(Refused, match=f"client 'ann': entry {place} "):
            secure_sum.upload("ann", 0, vector)


def test_too_few_clients_and_too_few_alive_are_refused() -> None:
    secure_sum = over(ThresholdSum)
    with pytest.raises(BelowThreshold):
        secure_sum.check_alive(["ann"])
    round_sum = secure_sum.begin(0)
    round_sum.add("ann", secure_sum.upload("ann", 0, ints(0)))
    with pytest.raises(Refused, match="at least 2 clients"):
        collect(round_sum, CLIENTS)
    round_sum = secure_sum.begin(1)
    for name in CLIENTS:
        round_sum.add(name, secure_sum.upload(name, 1, ints(0)))
    with pytest.raises(BelowThreshold):
        collect(round_sum, ["bob"])


def test_what_is_selected_leaves_hidden_and_nothing_else() -> None:
    """The clear part is there to be read; the rest leaves no trace of its integers."""
    secure_sum = over(ThresholdSum)
    vector = ints(1)
    sent = b"".join(secure_sum.upload("ann", 0, vector))
    assert vector[~HALF.mask_P].astype("<i2").tobytes() in sent
    secret = vector[HALF.mask_P]
    for dtype in ("<i2", "<i4", "<i8"):
        for start in range(0, secret.size - 4, 4):
            assert secret[start : start + 4].astype(dtype).tobytes() not in sent


def test_layers_are_chosen_by_pattern() -> None:
    chosen = by_layers(BLOCKS, ["*attn.o*", "layers.2.mlp.*"])
    ends = np.cumsum([block.size for block in BLOCKS])
    for block, end in zip(BLOCKS, ends, strict=True):
        expected = "attn.o" in block.name or block.name.startswith("layers.2.mlp")
        assert (chosen.mask_P[end - block.size : end] == expected).all()
    assert chosen.encrypted == 5 * 21 and chosen.fraction == 5 / 8
    assert chosen.in_the_clear() == "75 % of mlp.down.lora_B (all of layers 0-1, 3)"
    with pytest.raises(UserError, match=r"'\*q_proj\*' matches no trained parameter"):
        by_layers(BLOCKS, ["*attn*", "*q_proj*"])
    with pytest.raises(UserError, match="encrypts every parameter; leave selective out"):
        by_layers(BLOCKS, ["*"])


def test_the_most_sensitive_are_encrypted() -> None:
    sensitivity_P = np.random.default_rng(0).random(SIZE).astype(np.float32)
    chosen = by_sensitivity(BLOCKS, sensitivity_P, 0.3, "map.npy")
    assert chosen.encrypted == int(np.ceil(0.3 * SIZE))
    assert sensitivity_P[chosen.mask_P].min() > sensitivity_P[~chosen.mask_P].max()
    # Ties go to the earlier ones, so that the choice is one.
    flat = by_sensitivity(BLOCKS, np.zeros(SIZE, np.float32), 0.25, "zeros")
    assert flat.mask_P[: SIZE // 4].all() and not flat.mask_P[SIZE // 4 :].any()
    assert flat.in_the_clear() == (
        "50 % of mlp.down.lora_B (all of layers 2-3), all of attn.o.lora_B"
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda values: values[:-1], "has shape"),
        (lambda values: -values, "negative or not finite"),
        (lambda values: values * np.nan, "negative or not finite"),
        (lambda values: values / 0, "negative or not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_map_that_cannot_be_one_is_a_user_error(
    change: Callable[[np.ndarray], np.ndarray], match: str
) -> None:
    values = np.ones(SIZE, np.float32)
    with pytest.raises(UserError, match=match):
        by_sensitivity(BLOCKS, change(values), 0.5, "map.npy")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan"), 0.9999])
def test_a_fraction_that_leaves_one_part_empty_is_a_user_error(fraction: float) -> None:
    with pytest.raises(UserError, match=r"fraction|encrypts every parameter"):
        by_sensitivity(BLOCKS, np.ones(SIZE, np.float32), fraction, "map.npy")


def test_the_statement_says_what_is_left_open(hidden: type) -> None:
    words = over(hidden).statement()
    assert "only 62 % of the parameters (105 of 168; layers *attn.o*, layers.2.mlp.*)" in words
    assert words.endswith(
        "In the clear, read by the server for every client: "
        "75 % of mlp.down.lora_B (all of layers 0-1, 3)"
    )
    assert "\n" not in words
