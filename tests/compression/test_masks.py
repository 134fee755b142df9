"""Which numbers masks send."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.compression import RandomMask, Sketch, TopMask, TurnMask
from fedjax_llm.compression.strata import drawn, put, strata, take
from fedjax_llm.errors import UserError


# Compiling takes most of the time of these tests, and less with less optimisation.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def play(codec, state, key, x):
    """What is sent of a vector, how it arrives, and the next state."""
    y = codec.encode(state, key, x)
    return y, codec.decode(x, state, key, y), codec.advance(x, state, key, y)


def sent_by(codec, state, key, size):
    """The places of a vector that a codec sends."""
    return np.flatnonzero(play(codec, state, key, np.ones(size, np.float32))[1])


@pytest.mark.parametrize(("size", "one_in"), [(1, 12), (40, 7)])
def test_taking_is_the_transpose_of_putting(size, one_in):
    draw = np.random.default_rng(size)
    places = drawn(jax.random.key(size), size, one_in)
    assert places.shape == (strata(size, one_in),)
    x = jnp.asarray(draw.normal(size=size), jnp.float32)
    y = jnp.asarray(draw.normal(size=places.shape), jnp.float32)
    taken, back = take(x, places, one_in), put(y, places, one_in, size)
    np.testing.assert_allclose(taken @ y, x @ back, rtol=1e-4, atol=1e-5)
    inside = np.arange(places.size) * one_in + np.asarray(places) < size
    assert np.array_equal(np.asarray(taken)[~inside], np.zeros(np.sum(~inside)))
    assert np.array_equal(np.asarray(take(back, places, one_in))[inside], np.asarray(y)[inside])


@pytest.mark.parametrize(("size", "one_in"), [(50, 7), (49, 7), (5, 1), (3, 10)])
def test_turns_come_to_every_number_once(size, one_in):
    codec = TurnMask(one_in)
    x = np.ones(size, np.float32)
    state, seen = codec.init(x), []
    for _ in range(one_in):
        _, decoded, state = play(codec, state, jax.random.key(0), x)
        seen += np.flatnonzero(decoded).tolist()
    assert sorted(seen) == list(range(size))


def test_turns_are_not_in_step_with_the_order_of_a_message():
    """Rank 8 in a message whose numbers lie in rows of 8: each round sends all ranks."""
    codec, state = TurnMask(8), jnp.int32(3)
    ranks = sent_by(codec, state, jax.random.key(0), 8 * 200) % 8
    assert np.bincount(ranks, minlength=8).min() > 10


def test_random_masks_send_one_of_every_stratum_and_others_next_round():
    codec, size = RandomMask(5), 100
    rounds = [sent_by(codec, (), jax.random.key(number), size) for number in range(3)]
    for places in rounds:
        assert np.array_equal(places // 5, np.arange(20))
    assert not np.array_equal(rounds[0], rounds[1])


@pytest.mark.parametrize(
    ("size", "one_in", "explore"),
    [(1, 9, 0.5), (40, 1, 0.1), (60, 7, 0.0), (60, 7, 0.5), (60, 4, 1.0)],
)
def test_a_top_mask_sends_its_number_of_different_places(size, one_in, explore):
    codec = TopMask(one_in, explore)
    x = np.random.default_rng(size).uniform(1, 2, size).astype(np.float32)
    state = codec.init(x)
    for number in range(3):
        y, decoded, state = play(codec, state, jax.random.key(number), x)
        sent = np.flatnonzero(decoded)
        assert y.size == strata(size, one_in) == sent.size
        assert np.array_equal(np.sort(y), np.sort(x[sent]))
        assert np.array_equal(np.sort(state.order_P), np.arange(size))


def test_a_top_mask_sees_all_numbers_first_and_then_the_largest_most_often():
    """With memory, which is what its score is of: ten numbers of 100 are ten times as large."""
    size, codec = 100, TopMask(10, explore=0.0)
    x = np.ones(size, np.float32)
    large = np.random.default_rng(0).permutation(size)[:10]
    x[large] = 10.0
    state, memory, first, later = codec.init(x), np.zeros_like(x), [], np.zeros(size)
    for number in range(80):
        _, decoded, state = play(codec, state, jax.random.key(number), x + memory)
        places = np.flatnonzero(decoded)
        if number < 10:
            first += places.tolist()
        elif number >= 20:
            later[places] += 1
        memory = x + memory - np.asarray(decoded)
    assert sorted(first) == list(range(size))
    others = np.delete(later, large)
    assert later[large].min() > 2 * others.max()
    assert others.min() > 0  # nobody is forgotten


def test_with_memory_turns_leave_less_behind_than_chance():
    """The reason why there are turns: the memory after 30 rounds of one message, at one in ten."""
    x = np.random.default_rng(1).normal(size=100).astype(np.float32)
    left = {}
    for codec in (TurnMask(10), RandomMask(10)):
        state, memory = codec.init(x), np.zeros_like(x)
        for number in range(30):
            _, decoded, state = play(codec, state, jax.random.key(number), x + memory)
            memory = x + memory - np.asarray(decoded)
        left[codec.name] = np.linalg.norm(memory)
    assert left["turn-mask"] < 0.6 * left["random-mask"]


@pytest.mark.parametrize("codec", [RandomMask, TurnMask, TopMask, Sketch])
def test_nonsense_is_refused(codec):
    with pytest.raises(UserError, match=f"one_in of {codec.name} must be at least 1, got 0; 10"):
        codec(0)
    with pytest.raises(UserError, match=r"explore must be in \[0, 1\], got 1.5; 0.1 is usual"):
        TopMask(10, 1.5)


def test_a_sketch_is_as_long_for_every_message():
    """Within a fifth of norm / sqrt(T), where a mask sends all or nothing of a single number."""
    codec, size = Sketch(10), 4096
    for spikes in (1, 2, 4096):
        x = np.zeros(size, np.float32)
        x[:spikes] = np.random.default_rng(0).normal(size=spikes)
        y = play(codec, (), jax.random.key(spikes), x)[0]
        part = np.linalg.norm(y) / np.linalg.norm(x) * np.sqrt(10)
        assert 0.8 < part < 1.2
