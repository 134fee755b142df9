"""PowerSGD against singular values in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.compression import PowerSgd
from fedjax_llm.errors import UserError

KEY = jax.random.key(0)


# Compiling takes most of the time of these tests, and less with less optimisation.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def play(codec, state, messages):
    """The mean as it arrives and the next state."""
    like = messages[0]

    def mean(trees):
        return jax.tree.map(lambda *leaves: sum(leaves) / jnp.float32(len(leaves)), *trees)

    shared = codec.between(like, state, KEY, mean([codec.encode(state, KEY, m) for m in messages]))
    second = mean([codec.encode(state, KEY, m, 1, shared) for m in messages])
    decoded = codec.decode(like, state, KEY, second, shared)
    return decoded, codec.advance(like, state, KEY, second, shared), shared


def low_rank(seed, rank, shape=(3, 12, 9)):
    draw = np.random.default_rng(seed)
    left = draw.normal(size=(*shape[:-2], shape[-2], rank))
    return jnp.asarray(left @ draw.normal(size=(*shape[:-2], rank, shape[-1])), jnp.float32)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_mean_of_the_rank_that_is_sent_arrives_whole(rank):
    """At once, though the clients' own matrices have a higher rank."""
    codec, wanted = PowerSgd(rank), low_rank(1, rank)
    noise = low_rank(2, 9)
    messages = [wanted + noise, wanted - noise]
    decoded, _, _ = play(codec, codec.init(wanted), messages)
    assert np.linalg.norm(decoded - wanted) < 1e-5 * np.linalg.norm(noise)


def test_rounds_of_one_matrix_come_to_its_best_approximation():
    """Within a thousandth of what the singular value decomposition leaves; not in the first one."""
    codec, x = PowerSgd(2), low_rank(3, 9)
    best = np.sqrt(np.sum(np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)[:, 2:] ** 2))
    state, errors = codec.init(x), []
    for _ in range(80):
        decoded, state, _ = play(codec, state, [x])
        errors.append(float(np.linalg.norm(x - decoded)))
    assert errors[0] > 1.02 * best
    assert best * (1 - 1e-5) <= errors[-1] < 1.001 * best


def test_bases_are_orthonormal_whatever_the_mean():
    """Also of zeros, of equal columns, and of sizes far from one."""
    codec = PowerSgd(2)
    for x in (low_rank(4, 9), low_rank(5, 1), low_rank(6, 9) * 1e-12, low_rank(7, 0)):
        state = codec.init(x)
        for _ in range(2):
            _, state, shared = play(codec, state, [x])
            for basis in (*shared, *state):
                gram = np.einsum("lds,lde->lse", basis, basis)
                np.testing.assert_allclose(gram, np.broadcast_to(np.eye(2), gram.shape), atol=1e-5)


def test_a_round_of_zeros_does_not_forget_the_directions():
    codec, x = PowerSgd(2), low_rank(8, 9)
    _, state, _ = play(codec, codec.init(x), [x])
    _, after, _ = play(codec, state, [jnp.zeros_like(x)])
    assert np.array_equal(after[0], state[0])


def test_what_would_not_get_smaller_goes_whole():
    tree = {"bias": jnp.arange(5.0), "square": low_rank(9, 3, (2, 3, 3)), "wide": low_rank(9, 9)}
    codec = PowerSgd(2)
    decoded, _, _ = play(codec, codec.init(tree), [tree])
    for name in ("bias", "square"):
        assert np.array_equal(decoded[name], tree[name])
    assert codec.size(tree, 0) == 3 * 12 * 2
    assert codec.size(tree, 1) == 3 * 9 * 2 + 5 + 2 * 3 * 3


def test_messages_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"rank 2 of power-sgd makes no array .* shape \(4, 3, 3\)"):
        PowerSgd(2).init({"r": jnp.zeros((4, 3, 3)), "bias": jnp.zeros(7)})
    with pytest.raises(UserError, match=r"shape \(\);"):
        PowerSgd(2).init({})
    with pytest.raises(UserError, match="rank of power-sgd must be at least 1, got 0"):
        PowerSgd(0)
