"""The decoder of the Llama family in flax.nnx, and its pure form over a dictionary of weights.

Letters in names: B rows, T positions, S key positions, L layers, D width, H query heads, G key and
value heads, K width of a head, F outputs of a projection, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_llm.errors import UserError
from fedjax_llm.models.attention import Sight, attend, causal_sight
from fedjax_llm.models.config import DecoderConfig, projection_shapes
from fedjax_llm.models.quantised import frozen_matmul
from fedjax_llm.models.rotary import Rotation, rotate, rotation, segment_positions
from fedjax_llm.models.spread import whole
from fedjax_llm_kernels.gate import silu_gate
from fedjax_llm_kernels.low_rank import low_rank_matmuls

type Base = dict[str, Any]
"""Frozen weights: a nested dict of arrays; everything under "layers" is stacked [L, ...].

A kernel may be `Quantised` in place of an array; a kernel and an embedding may be `Spread`.
"""
type Factors = Mapping[str, tuple[jax.Array, jax.Array]]
"""Low-rank factors (a, b) by projection name."""


class AdapterLike(Protocol):
    """What the decoder needs to know of an adapter; ``fedjax_llm.lora.Adapter`` is one."""

    @property
    def factors(self) -> Factors:
        """By projection name: a [L, inputs, rank] and b [L, rank, outputs]."""

    @property
    def scale(self) -> float:
        """Multiplies every low-rank product."""


class Cache(NamedTuple):
    """Keys and values of one layer, or of all layers with a leading L."""

    k_BxSxGxK: jax.Array
    v_BxSxGxK: jax.Array


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation of the last axis, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.ones((width,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = (x32 * jax.lax.rsqrt(mean_square + jnp.float32(self.eps))).astype(x.dtype)
        weight = self.weight[...].astype(x.dtype)
        return normed * jax.lax.expand_dims(weight, range(x.ndim - 1))


class Projection(nnx.Module):
    """A frozen linear map, stored [in, out]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(
            jax.random.normal(rngs.params(), (inputs, outputs)) * jnp.float32(inputs**-0.5)
        )
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        y_BxTxF = frozen_matmul(x_BxTxD, self.kernel.get_value())
        if self.bias is not None:
            y_BxTxF += self.bias[...].astype(x_BxTxD.dtype)[None, None, :]
        return y_BxTxF


class Block(nnx.Module):
    """One layer: attention and a gated feed-forward layer, each normalised before and added."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        shapes = projection_shapes(config)
        biased = ("q_proj", "k_proj", "v_proj") if config.qkv_bias else ()

        def projection(name: str) -> Projection:
            return Projection(*shapes[name], bias=name in biased, rngs=rngs)

        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.q_proj = projection("q_proj")
        self.k_proj = projection("k_proj")
        self.v_proj = projection("v_proj")
        self.o_proj = projection("o_proj")
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_proj = projection("gate_proj")
        self.up_proj = projection("up_proj")
        self.down_proj = projection("down_proj")

    def __call__(
        self,
        x_BxTxD: jax.Array,
        by: Rotation,
        sight: Sight,
        factors: Factors,
        scale: float,
        cache: Cache | None = None,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the layer; with a cache, its keys and values enter at slot ``start`` first."""
        config = self.config
        batch, length, _ = x_BxTxD.shape

        def project(x: jax.Array, *names: str) -> list[jax.Array]:
            # Projections of the same activations share what their factors multiply.
            found = {name: getattr(self, name)(x) for name in names}
            adapted = [name for name in names if name in factors]
            sides = (factors[name] for name in adapted)
            pairs = [(a.astype(x.dtype), b.astype(x.dtype)) for a, b in sides]
            for name, y in zip(adapted, low_rank_matmuls(x, pairs, scale), strict=True):
                found[name] += y
            return list(found.values())

        q, k, v = (
            y.reshape(batch, length, -1, config.head_dim)
            for y in project(self.input_norm(x_BxTxD), "q_proj", "k_proj", "v_proj")
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, by), rotate(k, by)
        if cache is not None:
            assert start is not None
            k = jax.lax.dynamic_update_slice_in_dim(cache.k_BxSxGxK, k, start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.v_BxSxGxK, v, start, axis=1)
            cache = Cache(k, v)
        mixed = attend(q, k, v, sight).reshape(batch, length, -1)
        (y_BxTxD,) = project(mixed, "o_proj")
        x_BxTxD = x_BxTxD + y_BxTxD

        gate, up = project(self.post_norm(x_BxTxD), "gate_proj", "up_proj")
        (y_BxTxD,) = project(silu_gate(gate, up), "down_proj")
        return x_BxTxD + y_BxTxD, cache


class Decoder(nnx.Module):
    """Embedding, L layers whose weights are stacked, final norm and unembedding."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        deviation = jnp.float32(config.hidden_size**-0.5)
        self.embed = nnx.Param(jax.random.normal(rngs.params(), shape) * deviation)
        self.layers = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(
            jax.random.split(rngs.params(), config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.unembed = (
            None
            if config.tie_embeddings
            else nnx.Param(jax.random.normal(rngs.params(), shape) * deviation)
        )

    def embedded(self, tokens_BxT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Rows of the embedding; a token outside the vocabulary becomes NaN, not another token."""
        tokens_BxT = jnp.where(tokens_BxT < 0, self.config.vocab_size, tokens_BxT)
        embed_VxD = whole(self.embed.get_value())
        rows_BxTxD = jnp.take(embed_VxD, tokens_BxT, axis=0, mode="fill", fill_value=jnp.nan)
        return rows_BxTxD.astype(dtype)

    def run_layers(
        self,
        x_BxTxD: jax.Array,
        by: Rotation,
        sight: Sight,
        adapter: AdapterLike | None,
        cache_L: Cache | None = None,
        start: jax.Array | None = None,
        *,
        remat: bool = False,
        unroll: int = 1,
    ) -> tuple[jax.Array, Cache | None]:
        """Scans the layers over the activations and, where given, the cache."""
        graph, weights_L = nnx.split(self.layers)
        factors_L = {} if adapter is None else dict(adapter.factors)
        scale = 1.0 if adapter is None else adapter.scale

        def step(
            x_BxTxD: jax.Array, layer: tuple[Base, Factors, Cache | None]
        ) -> tuple[jax.Array, Cache | None]:
            weights, factors, cache = layer
            block: Block = nnx.merge(graph, weights)
            return block(x_BxTxD, by, sight, factors, scale, cache, start)

        # Inside a scan the compiler cannot merge the two passes that prevent_cse keeps apart.
        body: Callable[..., Any] = jax.checkpoint(step, prevent_cse=False) if remat else step
        layers = (nnx.to_pure_dict(weights_L), factors_L, cache_L)
        return jax.lax.scan(body, x_BxTxD, layers, unroll=min(unroll, self.config.num_layers))

    def unembedding(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The output embedding [V, D]."""
        weights = self.embed if self.unembed is None else self.unembed
        found: jax.Array = whole(weights.get_value()).astype(dtype)
        return found


@functools.lru_cache(maxsize=16)
def _abstract(config: DecoderConfig) -> tuple[Any, Base]:
    """Structure of the module, and the shapes of its weights."""
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(decoder)
    return graph, nnx.to_pure_dict(state)


def base_shapes(config: DecoderConfig) -> Base:
    """The base pytree with ``jax.ShapeDtypeStruct`` leaves (float32)."""
    return jax.tree.map(lambda leaf: leaf, _abstract(config)[1])


@functools.partial(jax.jit, static_argnums=0)
def init_base(config: DecoderConfig, key: jax.Array) -> Base:
    """Random float32 weights, for tests and for training from nothing."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key))))


def bind(config: DecoderConfig, base: Base) -> Decoder:
    """The module around given weights; they are not copied."""
    return nnx.merge(_abstract(config)[0], base)


def check_adapter(config: DecoderConfig, adapter: AdapterLike | None) -> None:
    """Refuses an adapter made for other sizes, before it becomes a broadcasting error.

    Raises:
      UserError: A factor has the wrong name or shape.
    """
    if adapter is None:
        return
    shapes = projection_shapes(config)
    for name, (a, b) in adapter.factors.items():
        if name not in shapes:
            raise UserError(f"adapter has a factor {name!r}; the model has {', '.join(shapes)}")
        inputs, outputs = shapes[name]
        rank = a.shape[-1]
        want_a, want_b = (config.num_layers, inputs, rank), (config.num_layers, rank, outputs)
        if a.shape != want_a or b.shape != want_b:
            raise UserError(
                f"adapter factor {name} has shapes {a.shape} and {b.shape}, the model needs "
                f"{want_a} and {want_b}; use the model that the adapter was trained on"
            )


def hidden(
    config: DecoderConfig,
    base: Base,
    adapter: AdapterLike | None,
    tokens_BxT: jax.Array,
    segments_BxT: jax.Array | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    unroll: int = 1,
) -> jax.Array:
    """Final activations after the last norm, of the given dtype, [B, T, D].

    Args:
      config: Static description.
      base: Frozen weights; pass them as an argument of the jitted function, never closed over.
      adapter: Low-rank additions, or None.
      tokens_BxT: int32.
      segments_BxT: int32 as in ``Batch``, or None when each row is one sequence without padding.
      dtype: Of activations and matrix products; norms, scores and softmax are float32.
      remat: Recompute each layer in the backward pass, to keep one activation a layer.
      unroll: Layers that are compiled in a row: more to compile, less to copy between them.
    """
    check_adapter(config, adapter)
    decoder = bind(config, base)
    length = tokens_BxT.shape[1]
    positions_BxT = (
        jnp.arange(length, dtype=jnp.int32)[None, :]
        if segments_BxT is None
        else segment_positions(segments_BxT)
    )
    x_BxTxD, _ = decoder.run_layers(
        decoder.embedded(tokens_BxT, dtype),
        rotation(config, positions_BxT),
        causal_sight(
            (tokens_BxT.shape[0], length),
            segments_BxT,
            config.sliding_window,
            width=config.head_dim,
            dtype=dtype,
        ),
        adapter,
        remat=remat,
        unroll=unroll,
    )
    return decoder.norm(x_BxTxD)


def apply(
    config: DecoderConfig,
    base: Base,
    adapter: AdapterLike | None,
    tokens_BxT: jax.Array,
    segments_BxT: jax.Array | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Logits of the next token at each position, float32 [B, T, V]; arguments as ``hidden``."""
    x_BxTxD = hidden(config, base, adapter, tokens_BxT, segments_BxT, dtype=dtype)
    return jnp.einsum(
        "btd,vd->btv",
        x_BxTxD,
        bind(config, base).unembedding(dtype),
        preferred_element_type=jnp.float32,
    )
