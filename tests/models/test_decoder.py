"""Properties of the decoder and its loss, and an independent plain-numpy decoder as oracle."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.lora import LoraConfig, init_adapter, merge
from fedjax_llm.models import Batch, DecoderConfig, RopeScaling, apply, init_base, loss

logits_of = partial(jax.jit, static_argnums=0)(apply)

PLAIN = DecoderConfig(61, 24, 40, 3, 4, 2, 6, tie_embeddings=True)
CONFIGS = {
    "llama-tied": PLAIN,
    "llama-untied": dataclasses.replace(PLAIN, tie_embeddings=False),
    "llama-all-heads": dataclasses.replace(PLAIN, num_kv_heads=4),
    "llama3-rope": dataclasses.replace(
        PLAIN, rope_theta=500.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    ),
    "linear-rope": dataclasses.replace(PLAIN, rope_scaling=RopeScaling("linear", 4.0)),
    "mistral-window": dataclasses.replace(
        PLAIN, sliding_window=4, architecture="MistralForCausalLM"
    ),
    "qwen2": dataclasses.replace(PLAIN, qkv_bias=True, architecture="Qwen2ForCausalLM"),
    "qwen3": dataclasses.replace(PLAIN, qk_norm=True, head_dim=10, architecture="Qwen3ForCausalLM"),
}


def weights(config: DecoderConfig, seed: int = 0):
    """Random weights in which norms and biases differ from their start of one and zero."""
    base = init_base(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(base)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten(
        [
            leaf + 0.2 * jax.random.normal(key, leaf.shape)
            for leaf, key in zip(leaves, keys, strict=True)
        ]
    )


def trained(config: DecoderConfig, seed: int = 0):
    """An adapter on all projections whose B is not zero."""
    adapter = init_adapter(config, LoraConfig(2, 6.0, ("all-linear",)), jax.random.key(seed))
    noise = jax.random.normal(jax.random.key(seed + 1), ())
    return jax.tree.map(lambda leaf: leaf + 0.05 * noise, adapter)


def tokens_of(config: DecoderConfig, rows: int, length: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, config.vocab_size, jnp.int32)


def numpy_logits(config: DecoderConfig, base, tokens) -> np.ndarray:
    """One sequence, one head and one position at a time, in float64; shares no code with ours."""
    base = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), base)

    def norm(x, weight):
        return x / math.sqrt((x @ x) / len(x) + config.rms_norm_eps) * weight

    def angle(position, pair):
        wavelength = 2 * math.pi * config.rope_theta ** (2 * pair / config.head_dim)
        scaling = config.rope_scaling
        if scaling is not None and scaling.kind == "linear":
            wavelength *= scaling.factor
        if scaling is not None and scaling.kind == "llama3":
            low = scaling.original_max_positions / scaling.low_freq_factor
            high = scaling.original_max_positions / scaling.high_freq_factor
            if wavelength > low:
                wavelength *= scaling.factor
            elif wavelength > high:
                smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) / wavelength / scaling.factor + smooth / wavelength
                wavelength = 1 / frequency
        return 2 * math.pi * position / wavelength

    def turn(x, position):
        half = config.head_dim // 2
        out = np.empty_like(x)
        for pair in range(half):
            c, s = math.cos(angle(position, pair)), math.sin(angle(position, pair))
            out[pair] = x[pair] * c - x[pair + half] * s
            out[pair + half] = x[pair + half] * c + x[pair] * s
        return out

    stream = [base["embed"][token] for token in tokens]
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], base["layers"])

        def linear(name, x, block=block):
            return x @ block[name]["kernel"] + block[name].get("bias", 0.0)

        def heads(name, x, count, position, block=block, linear=linear):
            parts = linear(f"{name}_proj", x).reshape(count, config.head_dim)
            if name == "v":
                return parts
            if config.qk_norm:
                parts = [norm(part, block[f"{name}_norm"]["weight"]) for part in parts]
            return [turn(part, position) for part in parts]

        normed = [norm(x, block["input_norm"]["weight"]) for x in stream]
        q = [heads("q", x, config.num_heads, t) for t, x in enumerate(normed)]
        k = [heads("k", x, config.num_kv_heads, t) for t, x in enumerate(normed)]
        v = [heads("v", x, config.num_kv_heads, t) for t, x in enumerate(normed)]
        for t in range(len(tokens)):
            first = 0 if config.sliding_window is None else max(0, t + 1 - config.sliding_window)
            mixed = []
            for head in range(config.num_heads):
                group = head // (config.num_heads // config.num_kv_heads)
                scores = np.array([q[t][head] @ k[s][group] for s in range(first, t + 1)])
                share = np.exp(scores / math.sqrt(config.head_dim))
                share /= share.sum()
                mixed.append(sum(w * v[first + i][group] for i, w in enumerate(share)))
            stream[t] = stream[t] + linear("o_proj", np.concatenate(mixed))
        for t, x in enumerate(stream):
            h = norm(x, block["post_norm"]["weight"])
            gate = linear("gate_proj", h)
            stream[t] = x + linear("down_proj", gate / (1 + np.exp(-gate)) * linear("up_proj", h))
    unembed = base.get("unembed", base["embed"])
    return np.stack([unembed @ norm(x, base["norm"]["weight"]) for x in stream])


@pytest.fixture(params=CONFIGS, name="config")
def _config(request: pytest.FixtureRequest) -> DecoderConfig:
    return CONFIGS[request.param]


def test_equals_a_plain_numpy_decoder(config):
    base, tokens = weights(config), tokens_of(config, 1, 14)
    expected = numpy_logits(config, base, np.asarray(tokens[0]))
    np.testing.assert_allclose(
        logits_of(config, base, None, tokens)[0], expected, rtol=1e-4, atol=1e-4
    )


def test_the_rope_scalings_under_test_differ_from_plain_rope():
    tokens = tokens_of(PLAIN, 1, 14)
    plain = logits_of(PLAIN, weights(PLAIN), None, tokens)
    for name in ("llama3-rope", "linear-rope", "mistral-window"):
        other = logits_of(CONFIGS[name], weights(CONFIGS[name]), None, tokens)
        assert float(jnp.abs(plain - other).max()) > 1e-3


def test_a_position_does_not_see_later_ones(config):
    base, tokens = weights(config), tokens_of(config, 2, 12)
    before = logits_of(config, base, None, tokens)
    after = logits_of(config, base, None, tokens.at[:, 7].set((tokens[:, 7] + 1) % 61))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert float(jnp.abs(before[:, 7] - after[:, 7]).max()) > 1e-3


@pytest.mark.parametrize("left", [0, 3])
def test_padding_has_no_effect_and_gives_no_nan(config, left):
    base, tokens = weights(config), tokens_of(config, 2, 9)
    alone = logits_of(config, base, None, tokens)
    pad = ((0, 0), (left, 5))
    for filler in (0, 60):
        padded = jnp.pad(tokens, pad, constant_values=filler)
        segments = jnp.pad(jnp.ones_like(tokens), pad)
        logits = logits_of(config, base, None, padded, segments)
        assert np.isfinite(logits).all()
        np.testing.assert_allclose(logits[:, left : left + 9], alone, rtol=1e-4, atol=1e-4)


def test_packed_examples_do_not_see_each_other(config):
    base, adapter = weights(config), trained(config)
    first, second = tokens_of(config, 1, 5, seed=1), tokens_of(config, 1, 8, seed=2)
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.asarray([[1] * 5 + [2] * 8 + [0] * 3], jnp.int32)
    logits = logits_of(config, base, adapter, packed, segments)
    for part, span in ((first, slice(0, 5)), (second, slice(5, 13))):
        np.testing.assert_allclose(
            logits[:, span], logits_of(config, base, adapter, part), rtol=1e-4, atol=1e-4
        )


def batch_of(config: DecoderConfig, rows: int = 4, length: int = 16) -> Batch:
    rng = np.random.default_rng(0)
    segments = np.array([[1] * 6 + [2] * 7 + [0] * 3, [1] * 16, [1] * 2 + [0] * 14, [0] * 16])
    mask = rng.random((rows, length)) < 0.7
    mask[:, 1] = True
    return Batch(
        tokens_of(config, rows, length), jnp.asarray(mask), jnp.asarray(segments, jnp.int32)
    )


def test_loss_equals_the_dense_log_softmax(config):
    base, adapter, batch = weights(config), trained(config), batch_of(config)
    nll, count = loss(config, base, adapter, batch)
    logits = logits_of(config, base, adapter, batch.tokens_BxT, batch.segments_BxT)
    logprob = np.asarray(jax.nn.log_softmax(logits), np.float64)
    want_nll, want_count = np.zeros(4), np.zeros(4, int)
    for row in range(4):
        for t in range(1, 16):
            segment = int(batch.segments_BxT[row, t])
            same = segment and segment == int(batch.segments_BxT[row, t - 1])
            if same and batch.loss_mask_BxT[row, t]:
                want_nll[row] -= logprob[row, t - 1, int(batch.tokens_BxT[row, t])]
                want_count[row] += 1
    assert nll.dtype == jnp.float32 and count.dtype == jnp.int32
    np.testing.assert_array_equal(count, want_count)
    np.testing.assert_allclose(nll, want_nll, rtol=1e-5, atol=1e-4)
    assert (want_count[:3] > 0).all() and want_count[3] == 0 and nll[3] == 0.0


def gradient(config, base, adapter, batch, **options):
    def total(adapter):
        return jnp.sum(loss(config, base, adapter, batch, **options)[0])

    return jax.jit(jax.grad(total))(adapter)


def close(got, want, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=rtol, atol=atol), got, want)


def test_gradient_equals_that_of_the_dense_loss():
    config = CONFIGS["qwen3"]
    base, adapter, batch = weights(config), trained(config), batch_of(config)
    same = batch.segments_BxT[:, 1:] == batch.segments_BxT[:, :-1]
    counted = batch.loss_mask_BxT[:, 1:] & same & (batch.segments_BxT[:, 1:] > 0)

    def dense(adapter):
        logits = apply(config, base, adapter, batch.tokens_BxT, batch.segments_BxT)
        logprob = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(logprob, batch.tokens_BxT[:, 1:, None], axis=2)[..., 0]
        return -jnp.sum(jnp.where(counted, picked, 0.0))

    close(gradient(config, base, adapter, batch), jax.jit(jax.grad(dense))(adapter), atol=1e-4)


def test_remat_changes_memory_not_gradients():
    base, adapter, batch = weights(PLAIN), trained(PLAIN), batch_of(PLAIN)
    close(gradient(PLAIN, base, adapter, batch, remat=True), gradient(PLAIN, base, adapter, batch))


def test_gradients_of_single_examples_add_up_and_one_of_padding_is_zero():
    base, adapter, batch = weights(PLAIN), trained(PLAIN), batch_of(PLAIN)

    def one(adapter, row):
        return loss(PLAIN, base, adapter, jax.tree.map(lambda x: x[None], row))[0][0]

    each = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0)))(adapter, batch)
    close(jax.tree.map(lambda x: x.sum(0), each), gradient(PLAIN, base, adapter, batch), atol=1e-4)
    assert all((leaf[3] == 0).all() for leaf in jax.tree.leaves(each))


def test_vmap_over_adapters_equals_a_loop():
    base, batch = weights(PLAIN), batch_of(PLAIN)
    adapters = [trained(PLAIN, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    both = jax.jit(jax.vmap(lambda adapter: loss(PLAIN, base, adapter, batch)))(stacked)
    for client, adapter in enumerate(adapters):
        close(jax.tree.map(lambda x, i=client: x[i], both), loss(PLAIN, base, adapter, batch))


def test_the_shared_weight_is_read_once_for_all_clients_and_examples():
    """No product with a frozen weight is batched: the extra axes merge into its rows."""
    base = weights(PLAIN)
    adapters = jax.tree.map(lambda *x: jnp.stack(x), trained(PLAIN, 0), trained(PLAIN, 1))
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), batch_of(PLAIN))

    def one(adapter, row):
        return loss(PLAIN, base, adapter, jax.tree.map(lambda x: x[None], row))[0][0]

    step = jax.vmap(jax.vmap(jax.grad(one), in_axes=(None, 0)))
    frozen = {leaf.shape[1:] for leaf in jax.tree.leaves(base["layers"]) if leaf.ndim == 3}

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from products(inner)

    seen = 0
    for equation in products(jax.make_jaxpr(step)(adapters, batch).jaxpr):
        _, (left, right) = equation.params["dimension_numbers"]
        if any(variable.aval.shape in frozen for variable in equation.invars):
            seen += 1
            assert not left and not right
    assert seen >= 14  # seven projections, forward and backward


def test_merged_base_equals_base_with_adapter(config):
    base, adapter, tokens = weights(config), trained(config), tokens_of(config, 2, 10)
    merged = logits_of(config, merge(base, adapter), None, tokens)
    added = logits_of(config, base, adapter, tokens)
    np.testing.assert_allclose(merged, added, rtol=1e-3, atol=1e-3)
    assert float(jnp.abs(added - logits_of(config, base, None, tokens)).max()) > 1e-2


def test_bfloat16_activations_stay_near_float32():
    base, tokens = weights(PLAIN), tokens_of(PLAIN, 2, 10)
    exact = logits_of(PLAIN, base, None, tokens)
    rounded = jax.jit(partial(apply, dtype=jnp.bfloat16), static_argnums=0)(
        PLAIN, base, None, tokens
    )
    assert rounded.dtype == jnp.float32
    assert float(jnp.abs(exact - rounded).mean()) < 0.05 * float(jnp.abs(exact).mean())


def test_bfloat16_gradients_run_under_strict_promotion():
    got = gradient(PLAIN, weights(PLAIN), trained(PLAIN), batch_of(PLAIN), dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("token", [-1, 61])
def test_a_token_outside_the_vocabulary_is_nan_in_its_row_and_not_another_token(token):
    tokens = jnp.asarray([[3, token], [3, 4]], jnp.int32)
    logits = logits_of(PLAIN, weights(PLAIN), None, tokens)
    assert np.isnan(logits[0, 1]).all() and np.isfinite(logits[1]).all()


def test_an_adapter_of_another_model_is_refused():
    other = dataclasses.replace(PLAIN, hidden_size=32)
    with pytest.raises(UserError, match="adapter factor down_proj"):
        apply(PLAIN, weights(PLAIN), trained(other), tokens_of(PLAIN, 1, 4))
