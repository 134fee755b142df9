"""Which layers fragments send."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.compression import Fragment
from fedjax_llm.errors import UserError

KEY = jax.random.key(0)


@partial(jax.jit, static_argnums=0)
def play(codec, state, tree):
    coded = codec.encode(state, KEY, tree)
    decoded = codec.decode(tree, state, KEY, coded)
    return coded, decoded, codec.advance(tree, state, KEY, coded)


@pytest.mark.parametrize(("layers", "fragments"), [(6, 3), (7, 3), (5, 4), (3, 1)])
def test_layers_take_turns_in_strides(layers, fragments):
    codec = Fragment(fragments)
    x_LxDxR = np.arange(1, layers * 6 + 1, dtype=np.float32).reshape(layers, 2, 3)
    state, total = codec.init({"a": x_LxDxR}), np.zeros((layers, 2, 3))
    for number in range(2 * fragments):
        coded, decoded, state = play(codec, state, {"a": x_LxDxR})
        assert coded["a"].shape == (-(-layers // fragments), 2, 3)
        arrived = np.asarray(decoded["a"])
        sent = np.flatnonzero(arrived.any(axis=(1, 2)))
        assert np.array_equal(sent, np.arange(number % fragments, layers, fragments))
        assert np.array_equal(arrived[sent], x_LxDxR[sent])
        total += arrived
    assert np.array_equal(total, 2 * x_LxDxR)


@pytest.mark.parametrize(("shape", "most"), [((3, 2), 3), ((), 0)])
def test_more_fragments_than_layers_are_refused(shape, most):
    with pytest.raises(UserError, match=f"4 fragments need as many layers .* at most {most} frag"):
        Fragment(4).init({"a": jnp.zeros((9, 2)), "b": jnp.zeros(shape)})
    with pytest.raises(UserError, match="fragments must be at least 1, got 0"):
        Fragment(0)
