"""What every codec promises. A new codec is tested by being in `CODECS` and in `CASES`.

Tolerances: an encoding is a sum of at most 256 float32 products, most by pairs, so that its
relative error stays below 256 u = 1.6e-5; what is only moved and not computed is exact.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.compression import (
    CODECS,
    Chain,
    Codec,
    Fragment,
    Identity,
    PowerSgd,
    RandomMask,
    Rotated,
    Sketch,
    TopMask,
    TurnMask,
    count,
    feedback,
    largest_integer,
    pack,
    payload_bytes,
    quantise,
    step_for,
    unpack,
)
from fedjax_llm.errors import Refused, UserError

# Five layers, which four fragments do not divide; 245 numbers, which are no power of two; a matrix
# that no rank makes smaller.
SHAPES = {"q_proj": {"a": (5, 8, 3), "b": (5, 3, 7)}, "v_proj": {"r": (5, 2, 2)}}
LIKE = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
)

CASES: dict[str, Codec] = {
    "identity": Identity(),
    "rotation": Rotated(),
    "random-mask": RandomMask(6),
    "random-mask, unbiased": RandomMask(6, unbiased=True),
    "turn-mask": TurnMask(6),
    "top-mask": TopMask(6, explore=0.3),
    "sketch": Sketch(6),
    "sketch, unbiased": Sketch(6, unbiased=True),
    "power-sgd": PowerSgd(1),
    "fragment": Fragment(4),
    "top-mask, rotation": Chain((TopMask(6), Rotated())),
    "power-sgd, random-mask, rotation": Chain((PowerSgd(1), RandomMask(2), Rotated())),
}


def message(seed: int, spikes: int = 0) -> Any:
    """A tree of normal numbers of unequal scales; or of a few numbers among zeros."""
    draw = np.random.default_rng(seed)

    def one(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        x = draw.normal(size=leaf.shape) * draw.uniform(0.2, 2.0, size=(leaf.shape[0], 1, 1))
        if spikes:
            kept = draw.permutation(x.size)[:spikes]
            x = np.where(np.isin(np.arange(x.size), kept).reshape(x.shape), x, 0.0)
        return x.astype(np.float32)

    return jax.tree.map(one, LIKE)


class Round(NamedTuple):
    """What a round of a codec came to; leaves of clients have the leading axis K.

    Attributes:
        encodings_K: of the clients, for each stage.
        shared: what the first of two sums told; () without.
        own_K: what arrives of each client's message alone.
        decoded: the mean message as it arrived.
        memory_K: what each client keeps for the next round.
        after: the next round's state.
    """

    encodings_K: list[Any]
    shared: Any
    own_K: Any
    decoded: Any
    memory_K: Any
    after: Any


# Clients of a round; as many messages as a test needs, the others of weight zero.
CLIENTS = 4
EQUAL = (0.25,) * CLIENTS


@functools.cache
def _compiled(name: str) -> Any:
    codec = CASES[name]

    def round_(
        state: Any, key: jax.Array, trees_K: Any, shares_K: jax.Array, memory_K: Any
    ) -> Round:
        trees_K = jax.vmap(feedback.corrected)(memory_K, trees_K)
        present_K = shares_K > 0
        shared: Any = ()
        encodings_K = []
        for stage in range(codec.stages):

            def one(tree: Any, stage: int = stage, shared: Any = shared) -> Any:
                return codec.encode(state, key, tree, stage, shared)

            encodings_K.append(jax.vmap(one)(trees_K))
            # Who has no share does not enter, whatever it holds.
            mean = jax.tree.map(
                lambda leaf_K: jnp.einsum(
                    "k,k...->...", shares_K, jnp.where(_like(present_K, leaf_K), leaf_K, 0.0)
                ),
                encodings_K[-1],
            )
            if stage + 1 < codec.stages:
                shared = codec.between(LIKE, state, key, mean)

        def decode(coded: Any) -> Any:
            return codec.decode(LIKE, state, key, coded, shared)

        # The mean is decoded beside the clients' encodings, so that it is compiled once.
        decoded = jax.vmap(decode)(
            jax.tree.map(
                lambda leaf_K, leaf: jnp.concatenate([leaf_K, leaf[None]]), encodings_K[-1], mean
            )
        )

        def remember(memory: Any, tree: Any, coded: Any, present: jax.Array) -> Any:
            return feedback.remember(codec, state, key, memory, tree, shared, coded, present)

        return Round(
            encodings_K,
            shared,
            client(decoded, slice(CLIENTS)),
            client(decoded, CLIENTS),
            jax.vmap(remember)(memory_K, trees_K, encodings_K[-1], present_K),
            codec.advance(LIKE, state, key, mean, shared),
        )

    # Compiling takes most of the time of these tests, and less with less optimisation.
    return jax.jit(round_, compiler_options={"xla_backend_optimization_level": 0})


def _like(present_K: jax.Array, leaf_K: jax.Array) -> jax.Array:
    return present_K.reshape(-1, *[1] * (leaf_K.ndim - 1))


def play(
    name: str,
    state: Any,
    key: jax.Array,
    messages: list[Any],
    shares: tuple[float, ...] = EQUAL,
    memory_K: Any = None,
) -> Round:
    """A round of at most four clients; those that are missing are copies of weight zero."""
    trees_K = stacked([*messages, *[messages[0]] * (CLIENTS - len(messages))])
    shares_K = np.zeros(CLIENTS, np.float32)
    shares_K[: len(messages)] = np.pad(shares, (0, CLIENTS))[: len(messages)]
    if memory_K is None:
        memory_K = jax.tree.map(np.zeros_like, trees_K)
    return jax.device_get(_compiled(name)(state, key, trees_K, shares_K / shares_K.sum(), memory_K))


@functools.cache
def warm(name: str) -> Any:
    """The state after two rounds, so that it is not only the first one that is tested."""
    state = CASES[name].init(LIKE)
    for number in range(2):
        state = play(
            name, state, round_key(number), [message(2 * number + k) for k in (1, 2)]
        ).after
    return state


def round_key(number: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(11), number)


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def client(trees_K: Any, place: int | slice) -> Any:
    return jax.tree.map(lambda leaf_K: leaf_K[place], trees_K)


def mixed(factors: list[float], trees: list[Any]) -> Any:
    """The weighted sum of trees, rounded once."""

    def one(*leaves: np.ndarray) -> np.ndarray:
        pairs = zip(factors, leaves, strict=True)
        return sum(factor * leaf.astype(np.float64) for factor, leaf in pairs).astype(np.float32)

    return jax.tree.map(one, *trees)


def flat(tree: Any) -> np.ndarray:
    """All numbers, float64."""
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([*leaves, np.zeros(0)]).astype(np.float64)


def length(tree: Any) -> float:
    return float(np.linalg.norm(flat(tree)))


def apart(one: Any, other: Any) -> float:
    """The distance of two trees, relative to the second."""
    return float(np.linalg.norm(flat(one) - flat(other)) / length(other))


def bits_of(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


ROUNDING = 1.6e-5
# Where a basis follows from a mean that is rounded otherwise, it turns with it.
TURNED = 1e-4
ALL = pytest.mark.parametrize("name", CASES)
PROJECTIONS = [name for name, codec in CASES.items() if codec.facts.projects]


def test_every_codec_is_tested() -> None:
    assert {codec.name for codec in CASES.values()} == {*CODECS, "chain"}


@ALL
def test_a_codec_says_what_it_is(name: str) -> None:
    codec = CASES[name]
    assert codec.name in (name.split(",")[0], "chain")
    assert codec.summary and ("arXiv" in codec.source or codec.source == "none")
    assert codec.facts.lossless_on
    assert bool(codec.facts.keeps) == bool(jax.tree.leaves(codec.init(LIKE)))


@ALL
def test_each_stage_is_linear(name: str) -> None:
    one, other = message(1), message(2)
    factors = [0.7, -1.9]
    # Only the first has a share, so that of two stages the second's basis is a fixed one.
    played = play(
        name, warm(name), round_key(9), [one, other, mixed(factors, [one, other])], (1.0,)
    )
    for trees_K in (*played.encodings_K, played.own_K):
        parts = [client(trees_K, place) for place in range(2)]
        assert apart(client(trees_K, 2), mixed(factors, parts)) < ROUNDING


@ALL
def test_the_mean_of_encodings_is_the_encoding_of_the_mean(name: str) -> None:
    """So that sums tell nothing apart, and the decoder sees one message."""
    state, key, shares = warm(name), round_key(9), (0.1, 0.2, 0.3, 0.4)
    messages = [message(seed) for seed in range(4)]
    together = play(name, state, key, messages, shares)
    alone = play(name, state, key, [mixed(list(shares), messages)])
    assert apart(together.decoded, alone.decoded) < (
        ROUNDING if CASES[name].stages == 1 else TURNED
    )


@ALL
def test_no_encoding_is_longer_than_its_message(name: str) -> None:
    """Dense, of one number, of three; so that a clip norm holds after as before."""
    messages = [message(3), message(4, 1), message(5, 3), message(6, 1)]
    played = play(name, warm(name), round_key(9), messages)
    for coded_K in played.encodings_K:
        for place, tree in enumerate(messages):
            assert length(client(coded_K, place)) <= length(tree) * (1 + ROUNDING)


@ALL
def test_it_is_an_orthogonal_projection_where_it_says_so(name: str) -> None:
    """And is none where it does not: the flag is worth reading."""
    facts, state, key = CASES[name].facts, warm(name), round_key(9)
    others, tree = [message(1), message(2)], message(3)
    once = client(play(name, state, key, [*others, tree], (0.5, 0.5, 0.0)).own_K, 2)
    twice = client(play(name, state, key, [*others, once], (0.5, 0.5, 0.0)).own_K, 2)
    if not facts.projects:
        assert apart(twice, once) > 0.5
        return
    assert apart(twice, once) < ROUNDING
    lost = flat(tree) - flat(once)
    assert abs(lost @ flat(once)) < ROUNDING * length(tree) ** 2
    assert (apart(once, tree) < ROUNDING) == (facts.lossless_on == "everything")


@ALL
def test_the_mean_over_keys_is_the_message_where_it_says_so(name: str) -> None:
    """The mean over 120 keys along twelve directions, within 4.5 of its standard errors.

    Directions: the message itself, three single numbers, and eight random ones. A right codec fails
    with a probability of 12 * 7e-6, once and for all, because the keys are fixed.
    """
    tree, state = message(4), CASES[name].init(LIKE)
    size, keys = count(LIKE), 120
    directions = np.concatenate([flat(tree)[None], np.eye(size)[[0, size // 2, size - 1]]])
    random = np.random.default_rng(0).normal(size=(8, size))
    directions = np.concatenate([directions, random])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    arrived = [flat(play(name, state, round_key(k), [tree]).decoded) for k in range(keys)]
    errors = (np.stack(arrived) - flat(tree)) @ directions.T
    allowed = 4.5 * errors.std(0, ddof=1) / np.sqrt(keys) + ROUNDING * length(tree)
    within = np.abs(errors.mean(0)) <= allowed
    assert within.all() if CASES[name].facts.unbiased else not within.all()


@ALL
def test_what_arrives_and_the_residual_are_the_message(name: str) -> None:
    tree = message(3)
    played = play(name, warm(name), round_key(9), [tree, message(5)])
    # The memory began empty, so that it is the residual.
    both = [client(played.own_K, 0), client(played.memory_K, 0)]
    assert apart(mixed([1, 1], both), tree) < 1e-6


@pytest.mark.parametrize("name", ["rotation", "turn-mask", "power-sgd"])
def test_the_residual_counts_what_left_the_client(name: str) -> None:
    tree, state, key = message(3), warm(name), round_key(9)
    played = play(name, state, key, [tree, message(5)])
    arrived, coded = client(played.own_K, 0), client(played.encodings_K[-1], 0)
    for part, sent in ((1.0, None), (0.5, mixed([0.5], [coded]))):
        lost = CASES[name].residual(state, key, tree, played.shared, sent)
        assert apart(mixed([part, 1], [arrived, jax.device_get(lost)]), tree) < 1e-6


@ALL
def test_clients_encode_alone_as_in_any_company_and_order(name: str) -> None:
    """In the same bytes where no matrix product is computed."""
    codec, state, key = CASES[name], warm(name), round_key(9)
    messages = [message(seed) for seed in range(4)]
    played = play(name, state, key, messages)
    turned = play(name, state, key, messages[::-1])
    last = codec.stages - 1
    alone = jax.device_get(codec.encode(state, key, messages[1], last, played.shared))
    both = [(alone, client(played.encodings_K[last], 1))]
    both += [
        (client(turned.encodings_K[0], 3 - k), client(played.encodings_K[0], k)) for k in (0, 3)
    ]
    for one, other in both:
        if codec.stages == 1:
            assert bits_of(one) == bits_of(other)
        else:
            assert apart(one, other) < 1e-6
    assert apart(turned.decoded, played.decoded) < TURNED


@ALL
def test_sizes_and_types_are_those_that_were_promised_in_every_round(name: str) -> None:
    codec, state = CASES[name], CASES[name].init(LIKE)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for number in range(7):  # once around all fragments and masks
        played = play(name, state, round_key(number), [message(number)])
        for stage, coded_K in enumerate(played.encodings_K):
            shapes = codec.shapes(LIKE, stage)
            coded = client(coded_K, 0)
            assert jax.tree.structure(coded) == jax.tree.structure(shapes)
            pairs = zip(jax.tree.leaves(coded), jax.tree.leaves(shapes), strict=True)
            assert all(x.shape == y.shape and x.dtype == y.dtype == jnp.float32 for x, y in pairs)
            assert codec.size(LIKE, stage) == flat(coded).size
        like = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), LIKE)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), played.decoded) == like
        state = played.after
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@ALL
def test_zero_stays_zero_and_a_round_of_zeros_does_no_harm(name: str) -> None:
    state, zero = warm(name), mixed([0.0], [message(0)])
    for number in range(2):
        played = play(name, state, round_key(number), [zero, zero])
        assert not np.any(flat(played.encodings_K)) and not np.any(flat(played.decoded))
        state = played.after
    assert np.any(flat(play(name, state, round_key(3), [message(1)]).decoded))


@ALL
@settings(max_examples=12, deadline=None)
@given(st.integers(0, count(LIKE) - 1), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_is_not_finite_shows_in_every_number_that_is_sent(
    name: str, place: int, value: float
) -> None:
    """And stays with its client: it enters no memory, and no sum of the others."""
    broken = put_at(message(1), place, value)
    played = play(name, warm(name), round_key(9), [message(2), broken], (1.0, 0.0))
    for coded_K in played.encodings_K:
        assert np.isnan(flat(client(coded_K, 1))).all()
    assert np.isfinite(flat(played.decoded)).all()
    taken = play(name, warm(name), round_key(9), [broken])
    assert np.isnan(flat(taken.own_K)).any()
    assert not np.any(flat(client(taken.memory_K, 0)))


def put_at(tree: Any, place: int, value: float) -> Any:
    """The tree with another value at a place of its flat form."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.copy, tree))
    for leaf in leaves:
        if 0 <= place < leaf.size:
            leaf.reshape(-1)[place] = value
        place -= leaf.size
    return jax.tree.unflatten(structure, leaves)


@ALL
def test_bytes_are_those_that_were_counted(name: str) -> None:
    codec = CASES[name]
    played = play(name, warm(name), round_key(9), [message(1)])
    for stage, coded_K in enumerate(played.encodings_K):
        y_M = flat(client(coded_K, 0)).astype(np.float32)
        size, bound = codec.size(LIKE, stage), float(np.abs(y_M).max())
        for bits in (2, 4, 5, 8, 16):
            step, largest = step_for(bound, bits), largest_integer(bits)
            # Rounded with zeros behind, so that all codecs share what is compiled.
            padded = np.pad(y_M, (0, 256 - size))
            ints_M = np.asarray(quantise(jax.random.key(1), padded, step, largest))[:size]
            payload = pack(ints_M, bits)
            assert len(payload) == payload_bytes(size, bits) == math.ceil(size * bits / 8)
            assert np.array_equal(unpack(payload, size, bits), ints_M)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_with_memory_nothing_is_lost_for_good(name: str) -> None:
    """What has arrived and the memories add up to all that was said; also of who stays away."""
    codec = CASES[name]
    feedback.check(codec)
    state = codec.init(LIKE)
    zero = jax.device_get(feedback.empty(LIKE))
    memory_K = stacked([zero] * CLIENTS)
    arrived, said = zero, zero
    for number in range(8):
        present = [float((number + place) % 4 > 0) for place in range(CLIENTS)]
        messages = [message(10 * number + place) for place in range(CLIENTS)]
        played = play(name, state, round_key(number), messages, tuple(present), memory_K)
        for place, here in enumerate(present):
            if not here:
                kept, before = (client(tree, place) for tree in (played.memory_K, memory_K))
                assert bits_of(kept) == bits_of(before)
        arrived = mixed([1, sum(present)], [arrived, played.decoded])
        said = mixed([1, *present], [said, *messages])
        state, memory_K = played.after, played.memory_K
    waiting = [client(memory_K, place) for place in range(CLIENTS)]
    assert apart(mixed([1] * (1 + CLIENTS), [arrived, *waiting]), said) < ROUNDING


@pytest.mark.parametrize("name", PROJECTIONS)
def test_with_memory_the_error_of_what_has_arrived_falls_like_one_over_the_rounds(
    name: str,
) -> None:
    """A message that is the same every round: the memory stays bounded, so that its share falls."""
    codec, tree, rounds = CASES[name], message(6), 90
    state, memory_K, longest = codec.init(LIKE), None, []
    for number in range(rounds):
        played = play(name, state, round_key(number), [tree], EQUAL, memory_K)
        state, memory_K = played.after, played.memory_K
        longest.append(length(client(memory_K, 0)) / length(tree))
    if codec.facts.lossless_on == "everything":
        assert max(longest) < ROUNDING
        return
    assert longest[0] > 0.3
    assert longest[-1] / rounds < 0.2
    # The second half adds nothing that the first has not seen.
    assert max(longest[rounds // 2 :]) < 1.4 * max(longest[: rounds // 2])


@pytest.mark.parametrize("name", sorted(set(CASES) - set(PROJECTIONS)))
def test_memory_on_what_is_no_projection_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="set unbiased = false"):
        feedback.check(CASES[name])


@ALL
def test_no_coordinate_passes_its_bound(name: str) -> None:
    """Over 20 keys and four messages; at a tail of 1e-6 any passes with a chance below 1e-4."""
    codec, state, norm = CASES[name], warm(name), 0.5
    messages = [message(8), message(9, 1), message(10, 2), message(11, 1)]
    bounds = [codec.coordinate_bound(LIKE, norm, 1e-6, stage) for stage in range(codec.stages)]
    for number in range(20):
        played = play(name, state, round_key(number), messages)
        for bound, coded_K in zip(bounds, played.encodings_K, strict=True):
            assert 0 < bound <= norm
            for place in range(CLIENTS):
                y_M = flat(client(coded_K, place))
                clipped_M = y_M * min(1, norm / max(np.linalg.norm(y_M), 1e-9))
                assert np.abs(clipped_M).max() <= bound * (1 + ROUNDING)
    for stage in range(codec.stages):
        assert codec.coordinate_bound(LIKE, norm, 0.0, stage) == norm
        assert 0 < codec.least_error_bound(LIKE, norm, 4, 8, stage) <= norm


@pytest.mark.parametrize(
    ("norm", "tail", "message"),
    [
        (0.0, 0.0, "the norm must be above 0 and finite, got 0; give a clip norm"),
        (float("inf"), 0.0, "got inf"),
        (float("nan"), 0.0, "got nan"),
        (1.0, 1.0, r"tail must be in \[0, 1\), got 1; 1e-6 is usual"),
        (1.0, -0.1, "got -0.1"),
    ],
)
def test_bounds_of_nonsense_are_refused(norm: float, tail: float, message: str) -> None:
    for codec in CASES.values():
        with pytest.raises(UserError, match=message):
            codec.coordinate_bound(LIKE, norm, tail)


@ALL
def test_other_types_are_refused(name: str) -> None:
    halves = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), message(0))
    with pytest.raises(UserError, match="a message holds bfloat16; cast it to float32"):
        CASES[name].encode(warm(name), round_key(0), halves)
