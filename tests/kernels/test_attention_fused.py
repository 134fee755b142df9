"""Attention without scores in memory: interpreted kernels against float64 and the XLA form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from fedjax_llm_kernels import attention_fused, attention_gpu, attention_tpu
from fedjax_llm_kernels.attention import softmax_attention
from fedjax_llm_kernels.attention_fused import causal_attention

FORMS = {
    "gpu": (attention_gpu.gpu_forward, attention_gpu.gpu_backward),
    "tpu": (attention_tpu.tpu_forward, attention_tpu.tpu_backward),
}
ROWS = 2


def problem(length, heads, groups, width, dtype=jnp.float32):
    """q, k, v, segments and a cotangent; two sequences and padding in the first row."""
    draw = np.random.default_rng(5)

    def normal(count):
        return jnp.asarray(draw.normal(size=(ROWS, length, count, width)), dtype)

    segments = np.ones((ROWS, length), np.int32)
    segments[0, length // 3 :] = 2
    segments[0, 2 * length // 3 + 1 :] = 0
    return normal(heads), normal(groups), normal(groups), jnp.asarray(segments), normal(heads)


def visible(segments, window):
    """What each query sees, by the definition, [B, T, T]."""
    segments, at = np.asarray(segments), np.arange(segments.shape[1])
    see = at[None, :] <= at[:, None]
    if window is not None:
        see &= at[None, :] > at[:, None] - window
    return see[None] & (segments[:, :, None] == segments[:, None, :])


def oracle(q, k, v, segments, dout, window):
    """The mix and the cotangents of q, k and v, in float64."""
    q, k, v, dout = (np.asarray(array, np.float64) for array in (q, k, v, dout))
    shared, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    k, v = (np.repeat(array, shared, axis=2) for array in (k, v))
    scores = np.einsum("bthk,bshk->bhts", q, k) * scale
    scores = np.where(visible(segments, window)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = np.einsum("bthk,bshk->bhts", dout, v)
    mean = (dweights * weights).sum(-1, keepdims=True)
    dscores = weights * (dweights - mean) * scale

    def each_group(array):
        return array.reshape(*array.shape[:2], -1, shared, array.shape[3]).sum(3)

    return (
        np.einsum("bhts,bshk->bthk", weights, v),
        np.einsum("bhts,bshk->bthk", dscores, k),
        each_group(np.einsum("bhts,bthk->bshk", dscores, q)),
        each_group(np.einsum("bhts,bthk->bshk", weights, dout)),
    )


def both_ways(form, window):
    """A kernel's mix and cotangents."""
    forward, backward = (partial(one, window=window, interpret=True) for one in FORMS[form])

    @jax.jit
    def run(q, k, v, segments, dout):
        out, lse = forward(q, k, v, segments)
        return out, *backward(q, k, v, segments, out, lse, dout)

    return run


def close(found, expected, relative):
    def compare(got, wanted):
        got, wanted = (np.asarray(array, np.float64) for array in (got, wanted))
        np.testing.assert_allclose(got, wanted, atol=relative * np.abs(wanted).max(), rtol=0)

    jax.tree.map(compare, found, expected)


CASES = [
    pytest.param((150, 4, 2, 24), 70, jnp.float32, id="window"),
    *(
        pytest.param(*case, marks=pytest.mark.drill)
        for case in (
            ((37, 4, 1, 8), None, jnp.float32),
            ((150, 4, 2, 24), None, jnp.float32),
            ((200, 3, 3, 64), 70, jnp.bfloat16),
            ((260, 8, 2, 128), None, jnp.bfloat16),
        )
    ),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("sizes", "window", "dtype"), CASES)
def test_mix_and_cotangents_are_those_of_the_oracle(form, sizes, window, dtype):
    arrays = problem(*sizes, dtype)
    found = both_ways(form, window)(*arrays)
    assert {leaf.dtype for leaf in found} == {jnp.dtype(dtype)}
    close(found, oracle(*arrays, window), 1e-6 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_that_nobody_sees_are_not_visited(form):
    """Zero times what is not a number would show."""
    q, k, v, _, dout = problem(384, 1, 1, 8)
    segments, (first, last) = jnp.ones((ROWS, 384), jnp.int32), (slice(0, 128), slice(256, 384))
    run = both_ways(form, 64)
    out, dq, dk, dv = run(q, k, v, segments, dout)

    def spoilt(array, place):
        return array.at[:, place].set(jnp.nan)

    # Queries of the first block: later keys do not come in. Of the last: keys before the window.
    for mine, keys in ((first, slice(128, 384)), (last, first)):
        other = run(q, spoilt(k, keys), spoilt(v, keys), segments, dout)
        np.testing.assert_array_equal(other[0][:, mine], out[:, mine])
        np.testing.assert_array_equal(other[1][:, mine], dq[:, mine])
    # Keys of the last block: earlier queries do not. Of the first: queries whose window is over.
    for mine, queries in ((last, slice(0, 256)), (first, last)):
        other = run(spoilt(q, queries), k, v, segments, spoilt(dout, queries))
        np.testing.assert_array_equal(other[2][:, mine], dk[:, mine])
        np.testing.assert_array_equal(other[3][:, mine], dv[:, mine])


WIDTH, HEADS, GROUPS, LAYERS, CLIENTS, LENGTH = 8, 2, 1, 2, 2, 12


def by_mask(q, k, v, segments):
    """The XLA form, with keys repeated for the heads that share them."""
    k, v = (jnp.repeat(array, q.shape[2] // array.shape[2], axis=2) for array in (k, v))
    mask = jnp.asarray(visible(np.ones((1, q.shape[1])), None))
    mask &= segments[:, :, None] == segments[:, None, :]
    return softmax_attention(*(array.swapaxes(1, 2) for array in (q, k, v)), mask).swapaxes(1, 2)


def of_client(attention, weights, x, segments):
    """Loss and gradient of layers with weights of their own, scanned and computed again."""

    def layer(x_BxTxD, sides):
        q, k, v = (
            (x_BxTxD @ sides[name]).reshape(ROWS, LENGTH, -1, WIDTH) for name in ("q", "k", "v")
        )
        mixed = attention(q, k, v, segments).reshape(ROWS, LENGTH, -1)
        return jnp.sin(x_BxTxD + mixed), None

    def loss(weights):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, weights)[0])

    return jax.value_and_grad(loss)(weights)


def clients():
    draw = np.random.default_rng(7)

    def normal(*shape):
        return jnp.asarray(draw.normal(size=(CLIENTS, *shape)), jnp.float32)

    heads = {"q": HEADS, "k": GROUPS, "v": GROUPS}
    weights = {name: normal(LAYERS, HEADS * WIDTH, n * WIDTH) for name, n in heads.items()}
    segments = draw.integers(0, 3, size=(CLIENTS, ROWS, LENGTH)).astype(np.int32)
    return weights, normal(ROWS, LENGTH, HEADS * WIDTH), jnp.asarray(segments)


def test_clients_with_own_weights_in_scanned_layers_on_several_devices():
    arrays = clients()
    mesh = jax.make_mesh((2,), ("clouds",), axis_types=(jax.sharding.AxisType.Auto,))

    def make(attention):
        each = jax.vmap(partial(of_client, attention))
        specs = {"in_specs": PartitionSpec("clouds"), "out_specs": PartitionSpec("clouds")}
        return jax.jit(jax.shard_map(each, mesh=mesh, check_vma=False, **specs))

    assert "pallas_call" in str(jax.make_jaxpr(make(causal_attention))(*arrays))
    close(make(causal_attention)(*arrays), make(by_mask)(*arrays), 1e-5)


@pytest.mark.drill
def test_rows_alone_and_mapped_examples_are_the_same():
    """As in the gradients of examples: `vmap` of a derivative, whose rows do not mix."""
    q, k, v, segments, dout = problem(20, 2, 1, 8)

    def of_row(q, k, v, segments, dout):
        out, pull = jax.vjp(lambda *qkv: causal_attention(*qkv, segments[None], 5), q, k, v)
        return out, pull(dout)

    apart = [array[:, None] for array in (q, k, v)]
    found = jax.jit(jax.vmap(of_row))(*apart, segments, dout[:, None])
    close(
        jax.tree.map(lambda leaf: leaf[:, 0], (found[0], *found[1])),
        oracle(q, k, v, segments, dout, 5),
        1e-6,
    )


def test_no_rows_give_no_results_and_no_gradients():
    q, k, v, segments, dout = (array[:0] for array in problem(5, 2, 1, 8))
    out, pull = jax.vjp(lambda *qkv: causal_attention(*qkv, segments), q, k, v)
    assert out.shape == q.shape
    assert [leaf.shape for leaf in pull(dout)] == [q.shape, k.shape, v.shape]


def test_what_there_is_no_kernel_for_is_said_with_the_cure():
    cannot = attention_fused.cannot
    assert cannot(64, jnp.bfloat16) is None
    assert cannot(256, jnp.float32) is None
    assert "257" in cannot(257, jnp.float32)
    assert "float16" in cannot(64, jnp.float16)
    for parts in (1, 2):
        with jax.sharding.use_abstract_mesh(AbstractMesh((parts,), ("model",))):
            assert (cannot(64, jnp.float32) is None) == (parts == 1)
    q, k, v, segments, _ = problem(5, 2, 1, 8)
    with pytest.raises(ValueError, match=r"float16.*cast"):
        causal_attention(*(array.astype(jnp.float16) for array in (q, k, v)), segments)
    with pytest.raises(ValueError, match="got 0"):
        causal_attention(q, k, v, segments, 0)
    with pytest.raises(ValueError, match="got 1 and 2"):
        causal_attention(k, q, q, segments)


@pytest.mark.filterwarnings("ignore:.*Triton backend is deprecated:DeprecationWarning")
def test_lowers_for_accelerators_without_scores_in_memory(lowered):
    length = 1000

    def trained(attention, q, k, v, segments, dout):
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, segments), q, k, v)
        return out, pull(dout)

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((4, 1, length, *sizes), dtype)

    arrays = shape(8, 64), shape(2, 64), shape(2, 64), shape(dtype=jnp.int32), shape(8, 64)
    of_clients = jax.vmap(partial(trained, causal_attention))
    assert lowered(of_clients, "tpu", *arrays) == {"tpu_custom_call"}
    assert "__gpu$xla.gpu.triton" in lowered(of_clients, "cuda", *arrays)

    def squares(attention):
        text = str(jax.make_jaxpr(jax.vmap(partial(trained, attention)))(*arrays))
        return sum(text.count(f"{size},{size}") for size in (length, 1024))

    assert squares(by_mask) > 0
    assert squares(causal_attention) == 0
