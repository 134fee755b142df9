"""Greedy generation with a cache of keys and values, in one compiled program."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.models.attention import cache_mask
from fedjax_llm.models.config import DecoderConfig
from fedjax_llm.models.decoder import AdapterLike, Base, Cache, bind, check_adapter
from fedjax_llm.models.model import Model
from fedjax_llm.models.rotary import rotation


def generate(
    model: Model,
    adapter: AdapterLike | None,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> list[int]:
    """Continues a prompt with the most likely token each time.

    Prompts and limits are rounded up to powers of two inside, so that a handful of programs serve
    all lengths.

    Args:
      model: The model; its ``config.eos_token_ids`` end the text.
      adapter: Low-rank additions, or None.
      prompt_ids: At least one token.
      max_new_tokens: At least one.
      dtype: Of activations, matrix products and the cache.

    Returns:
      The new tokens, without the prompt and without the token that ended the text.

    Raises:
      UserError: An empty prompt, a token outside the vocabulary, or more tokens than the model
        has positions.
    """
    config = model.config
    length = len(prompt_ids)
    if not length:
        raise UserError("the prompt is empty; give at least one token, such as the start token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}; raise it")
    strange = [token for token in prompt_ids if not 0 <= token < config.vocab_size]
    if strange:
        raise UserError(
            f"token {strange[0]} is outside the vocabulary of {config.vocab_size}; "
            "use the tokenizer of the same model"
        )
    if length + max_new_tokens > config.max_positions:
        raise UserError(
            f"{length} prompt tokens and {max_new_tokens} new ones exceed the model's "
            f"{config.max_positions} positions; shorten the prompt or lower max_new_tokens"
        )
    padded_1xP = np.zeros((1, _round_up(length)), np.int32)
    padded_1xP[0, :length] = prompt_ids
    tokens_M, count = _greedy(
        config,
        model.base,
        adapter,
        jnp.asarray(padded_1xP),
        jnp.int32(length),
        jnp.int32(max_new_tokens),
        slots=_round_up(max_new_tokens),
        dtype=jnp.dtype(dtype),
    )
    return [int(token) for token in np.asarray(tokens_M)[: int(count)]]


def _round_up(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("config", "slots", "dtype"))
def _greedy(
    config: DecoderConfig,
    base: Base,
    adapter: AdapterLike | None,
    prompt_1xP: jax.Array,
    length: jax.Array,
    limit: jax.Array,
    *,
    slots: int,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Tokens [slots] and how many of them were generated before an end token or the limit."""
    check_adapter(config, adapter)
    decoder = bind(config, base)
    unembed_VxD = decoder.unembedding(dtype)
    capacity = prompt_1xP.shape[1] + slots

    def run(
        tokens_1xT: jax.Array, cache: Cache, start: jax.Array, last: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """The token that follows position ``last`` of the given tokens, and the grown cache."""
        count = tokens_1xT.shape[1]
        positions_1xT = start + jnp.arange(count, dtype=jnp.int32)[None, :]
        x_1xTxD, grown = decoder.run_layers(
            decoder.embedded(tokens_1xT, dtype),
            rotation(config, positions_1xT),
            cache_mask(start, count, capacity, config.sliding_window),
            adapter,
            cache,
            start,
        )
        assert grown is not None
        x_1xD = decoder.norm(jax.lax.dynamic_index_in_dim(x_1xTxD, last, axis=1, keepdims=False))
        logits_1xV = jnp.einsum("bd,vd->bv", x_1xD, unembed_VxD, preferred_element_type=jnp.float32)
        return jnp.argmax(logits_1xV[0]).astype(jnp.int32), grown

    empty = jnp.zeros((config.num_layers, 1, capacity, config.num_kv_heads, config.head_dim), dtype)
    # Padding after the prompt leaves keys in the cache; each is overwritten by the token generated
    # for its slot before the mask lets any query see that slot.
    token, cache = run(prompt_1xP, Cache(empty, empty), jnp.int32(0), length - 1)
    ends_E = jnp.asarray(config.eos_token_ids, jnp.int32)
    State = tuple[jax.Array, jax.Array, jax.Array, Cache]

    def unfinished(state: State) -> jax.Array:
        _, count, token, _ = state
        return (count < limit) & ~jnp.any(token == ends_E)

    def step(state: State) -> State:
        tokens_M, count, token, cache = state
        tokens_M = tokens_M.at[count].set(token)
        token, cache = run(token[None, None], cache, length + count, jnp.int32(0))
        return tokens_M, count + 1, token, cache

    start = (jnp.zeros((slots,), jnp.int32), jnp.int32(0), token, cache)
    tokens_M, count, _, _ = jax.lax.while_loop(unfinished, step, start)
    return tokens_M, count
