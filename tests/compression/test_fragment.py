"""Which layers fragments send."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.compression import Fragment
from fedjax_llm.errors import UserError

KEY = jax.random.key(0)


@pytest.mark.parametrize(("layers", "fragments"), [(6, 3), (7, 3), (5, 4), (4, 4), (3, 1)])
def test_layers_take_turns_in_strides(layers, fragments):
    codec = Fragment(fragments)
    tree = {"a": jnp.asarray(np.arange(1.0, layers * 6 + 1).reshape(layers, 2, 3), jnp.float32)}
    state, total = codec.init(tree), np.zeros((layers, 2, 3))
    for number in range(2 * fragments):
        coded = codec.encode(state, KEY, tree)
        assert coded["a"].shape == (-(-layers // fragments), 2, 3)
        decoded = np.asarray(codec.decode(tree, state, KEY, coded)["a"])
        sent = np.flatnonzero(decoded.any(axis=(1, 2)))
        assert np.array_equal(sent, np.arange(number % fragments, layers, fragments))
        assert np.array_equal(decoded[sent], np.asarray(tree["a"])[sent])
        total += decoded
        state = codec.advance(tree, state, KEY, coded)
    assert np.array_equal(total, 2 * np.asarray(tree["a"]))


@pytest.mark.parametrize(("shape", "most"), [((3, 2), 3), ((), 0)])
def test_more_fragments_than_layers_are_refused(shape, most):
    with pytest.raises(UserError, match=f"4 fragments need as many layers .* at most {most} frag"):
        Fragment(4).init({"a": jnp.zeros((9, 2)), "b": jnp.zeros(shape)})
    with pytest.raises(UserError, match="fragments must be at least 1, got 0"):
        Fragment(0)
