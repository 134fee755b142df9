"""Gradient inversion: the text of a client's update, read out of its adapter's gradient.

The attack is DAGER's (arXiv 2405.15586) carried over to adapters. A projection y = x W + s x A B
over T positions with inputs X [T, D] and output gradients G [T, F] has

    dA = s X^T (G B^T)     [D, R], whose columns lie in the span of the inputs x_t;
    dB = s (X A)^T G       [R, F], whose columns lie in the span of the A^T x_t.

In the first layer the x_t are normalised embeddings, whatever the position and the adapter: a
vocabulary of candidates is tested one by one against the span (DAGER, section 4.1). In the second
layer x_t depends on all tokens up to t: prefixes are extended by the one token that fits (4.3). A
sum of gradients over rows and plain SGD steps keeps the first span; Adam does not, being nonlinear
in each coordinate.

When it works, with n the number of different inputs of the layer:

| observed | condition | why |
|---|---|---|
| dA | n <= R times the projections that share the input, n < D - 4, B not 0 | G B^T has rank n |
| dB alone, with A known (FFA-LoRA) | n < R - 4 | n vectors must not fill R dimensions |
| B = 0, as an adapter starts | dA is 0 and tells nothing; dB tells | |

n is the number of different tokens in the first layer and of positions in the second. The last
token of a text is only ever a target and enters no input: it cannot be found this way.

Letters: V vocabulary, D width, R rank, F outputs, T positions, C candidates.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fedjax_llm.aggregation import Part
from fedjax_llm.errors import UserError
from fedjax_llm.lora import Adapter
from fedjax_llm.models import DecoderConfig
from fedjax_llm.models.attention import attention_mask
from fedjax_llm.models.decoder import Base, bind
from fedjax_llm.models.rotary import rotation

# The projections that read the same normalised input.
SHARED_INPUT = ("q_proj", "k_proj", "v_proj")
# Distance from a span below which a vector is in it, where a random vector stands at 1. Rounding
# leaves about 1e-4; what is not in the text stands at 0.1 and more.
TOLERANCE = 0.02
# Dimensions that a span must leave free to say anything: in fewer, a wrong candidate among hundreds
# comes within the tolerance by chance.
_FREE = 4
_FLOOR = 1e-12


@dataclass(frozen=True)
class Inversion:
    """What the attack read.

    Attributes:
        tokens: ids. Those that the second layer placed, in order and with repetitions; then the
            others, each once and best first.
        placed: how many of them are in order.
        distances_V: float64, each vocabulary token's distance from the first layer's span; a
            random vector stands at 1.
    """

    tokens: tuple[int, ...]
    placed: int
    distances_V: NDArray[np.float64]

    def overlap(self, text: Sequence[int]) -> tuple[float, float]:
        """Precision and recall of the tokens as multisets; precision is 0 where none was read."""
        common = sum((Counter(self.tokens) & Counter(text)).values())
        return common / max(len(self.tokens), 1), common / max(len(text), 1)


def invert(
    config: DecoderConfig,
    base: Base,
    adapter: Adapter,
    update: Part,
    *,
    known: int | None = None,
    longest: int = 128,
    tolerance: float = TOLERANCE,
) -> Inversion:
    """Reads tokens out of an update.

    Args:
        config: of the model.
        base: frozen weights, public.
        adapter: that the client started from, public.
        update: what an observer holds: a gradient or a change of the adapter, up to any factor.
            Sides "a" and "b" of q, k and v projections are used; others are left alone.
        known: how many different tokens the text has, if the attacker is told, who then names as
            many in any case; None decides by `tolerance`.
        longest: most tokens of a text that is put in order.
        tolerance: see `TOLERANCE`.

    Raises:
        UserError: the update has none of the projections that the attack reads.
    """
    inputs_VxD = _normed(base["embed"], base, 0, config.rms_norm_eps)
    distances_V = _distances(inputs_VxD, adapter, update, 0, known)
    if distances_V is None:
        raise UserError(
            f"the attack reads updates of {', '.join(SHARED_INPUT)}, got {', '.join(update)}; "
            "adapt one of the former"
        )
    best = np.argsort(distances_V, kind="stable")
    if known is not None:
        return Inversion(tuple(int(v) for v in best[:known]), 0, distances_V)
    found = [int(v) for v in best if distances_V[v] < tolerance]
    if not found or config.num_layers < 2:
        return Inversion(tuple(found), 0, distances_V)
    order = _order(config, base, adapter, update, np.array(found), longest, tolerance)
    # A few tokens that the second layer did not place are kept: they are in the text somewhere.
    rest = [token for token in found if token not in order]
    return Inversion((*order, *rest), len(order), distances_V)


def column_space(matrix: NDArray[np.float64], rank: int | None = None) -> NDArray[np.float64]:
    """An orthonormal basis of the columns, [K, rank]; [K, K] or [K, 0] says that none stands out.

    Args:
        matrix: [K, C].
        rank: None cuts where the singular values fall most steeply: there rounding begins.
    """
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    if not np.isfinite(values).all() or values[0] <= _FLOOR:
        return left[:, :0]
    if rank is None:
        # Rounding alone falls no further than this; a full matrix has no cut.
        logs = np.log(np.maximum(values, 1e-9 * values[0]))
        falls = logs[:-1] - logs[1:]
        rank = (
            int(np.argmax(falls)) + 1 if falls.size and falls.max() > math.log(8) else len(values)
        )
    return left[:, :rank]


def _distances(
    inputs_CxD: NDArray[np.float64], adapter: Adapter, update: Part, layer: int, known: int | None
) -> NDArray[np.float64] | None:
    """Each candidate's smallest distance from a span that says anything, at most 1.

    None if the update has none of the projections.
    """
    names = [name for name in SHARED_INPUT if name in update]
    views = []
    columns = [
        np.asarray(update[name]["a"][layer], np.float64) for name in names if "a" in update[name]
    ]
    if columns:
        views.append((np.concatenate(columns, axis=1), inputs_CxD))
    for name in names:
        if "b" in update[name]:
            a_DxR = np.asarray(adapter.factors[name].a_LxDxR[layer], np.float64)
            views.append((np.asarray(update[name]["b"][layer], np.float64), inputs_CxD @ a_DxR))
    if not views:
        return None
    best_C = np.ones(len(inputs_CxD))
    for matrix, vectors in views:
        basis = column_space(matrix, None if known is None else min(known, *matrix.shape))
        if basis.shape[1] and basis.shape[0] - basis.shape[1] >= _FREE:
            best_C = np.minimum(best_C, _outside(vectors, basis))
    return best_C


def _outside(vectors_CxK: NDArray[np.float64], basis: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of vectors from a span, such that a random one stands at about 1."""
    left = vectors_CxK - (vectors_CxK @ basis) @ basis.T
    lengths = np.maximum(np.linalg.norm(vectors_CxK, axis=1), _FLOOR)
    free = math.sqrt(1 - basis.shape[1] / basis.shape[0])
    return np.linalg.norm(left, axis=1) / (lengths * free)


def _normed(x: jax.Array, base: Base, layer: int, eps: float) -> NDArray[np.float64]:
    """RMS norm and the layer's weight, in float64."""
    wide = np.asarray(x, np.float64)
    weight_D = np.asarray(base["layers"]["input_norm"]["weight"][layer], np.float64)
    return wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + eps) * weight_D


def _order(
    config: DecoderConfig,
    base: Base,
    adapter: Adapter,
    update: Part,
    candidates_C: NDArray[np.int64],
    longest: int,
    tolerance: float,
) -> list[int]:
    """The text, token by token: each is the candidate whose second-layer input is in the span."""
    one = dataclasses.replace(config, num_layers=1)
    first = {**base, "layers": jax.tree.map(lambda leaf: leaf[:1], base["layers"])}
    factors = jax.tree.map(lambda leaf: leaf[:1], adapter)

    @jax.jit
    def after_first_layer(base: Base, adapter: Adapter, tokens_CxT: jax.Array) -> jax.Array:
        decoder = bind(one, base)
        length = tokens_CxT.shape[1]
        positions_1xT = jnp.arange(length, dtype=jnp.int32)[None, :]
        x_CxTxD, _ = decoder.run_layers(
            decoder.embedded(tokens_CxT, jnp.float32),
            rotation(one, positions_1xT),
            attention_mask(length, None, config.sliding_window),
            adapter,
        )
        return x_CxTxD

    text: list[int] = []
    seen = np.zeros((config.hidden_size, 0))
    tokens_CxT = np.zeros((len(candidates_C), longest), np.int32)
    while len(text) < min(longest, config.hidden_size - _FREE):
        # What stands behind the position in question does not matter: attention is causal.
        tokens_CxT[:, len(text)] = candidates_C
        x_CxTxD = after_first_layer(first, factors, jnp.asarray(tokens_CxT))
        inputs_CxD = _normed(x_CxTxD[:, len(text)], base, 1, config.rms_norm_eps)
        distances_C = _distances(inputs_CxD, adapter, update, 1, None)
        assert distances_C is not None
        # An input that was there before says nothing: the first token repeated gives it again.
        distances_C = np.where(_outside(inputs_CxD, seen) < tolerance, np.inf, distances_C)
        best = int(np.argmin(distances_C))
        if distances_C[best] >= tolerance:
            break
        basis, _ = np.linalg.qr(np.column_stack([seen, inputs_CxD[best]]))
        seen = basis
        text.append(int(candidates_C[best]))
        tokens_CxT[:, len(text) - 1] = candidates_C[best]
    return text
