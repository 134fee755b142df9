"""Kernels in the four-bit NormalFloat of QLoRA (arXiv 2305.14314, section 3 and appendix E).

Letters: D inputs, F outputs, B blocks of inputs, G groups of outputs.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.models.quantised import Quantised, largest, nonzero

BLOCK = 64
GROUP = 256
# Quantiles of a normal distribution, scaled so that the outermost are -1 and 1, with an exact 0
# (appendix E).
TABLE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
_BETWEEN = (TABLE[1:] + TABLE[:-1]) / np.float32(2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scales8:
    """Positive scales in eight bits, evenly spaced between the least and the largest of a group.

    This is the paper's double quantisation with a grid that has a bound: a scale is wrong by at
    most 1/510 of its group's range, and a group of one value not at all.

    Attributes:
      codes_BxF: uint8 [..., B, F].
      least_BxG: float32 [..., B, G], G = ceil(F / 256).
      range_BxG: float32 [..., B, G], the largest less the least.
    """

    codes_BxF: jax.Array
    least_BxG: jax.Array
    range_BxG: jax.Array

    @classmethod
    def of(cls, scales_BxF: jax.Array) -> Self:
        """Rounds float32 scales [..., B, F] to the nearest of their group's 256."""
        missing = -scales_BxF.shape[-1] % GROUP
        widths = [(0, 0)] * (scales_BxF.ndim - 1) + [(0, missing)]
        # What fills the last group must not widen its range.
        grouped = jnp.pad(scales_BxF, widths, mode="edge").reshape(
            *scales_BxF.shape[:-1], -1, GROUP
        )
        least_BxG = jnp.min(grouped, axis=-1)
        range_BxG = jnp.max(grouped, axis=-1) - least_BxG
        least_BxF, range_BxF = (_for_outputs(x, scales_BxF) for x in (least_BxG, range_BxG))
        codes_BxF = jnp.round((scales_BxF - least_BxF) / nonzero(range_BxF) * 255.0)
        return cls(codes_BxF.astype(jnp.uint8), least_BxG, range_BxG)

    def dequantised(self) -> jax.Array:
        """The scales, float32 [..., B, F]."""
        codes_BxF = self.codes_BxF
        least_BxF = _for_outputs(self.least_BxG, codes_BxF)
        range_BxF = _for_outputs(self.range_BxG, codes_BxF)
        return least_BxF + codes_BxF.astype(jnp.float32) * jnp.float32(1 / 255) * range_BxF


def _for_outputs(of_groups_BxG: jax.Array, like_BxF: jax.Array) -> jax.Array:
    """Each group's value for each of its outputs."""
    return jnp.repeat(of_groups_BxG, GROUP, axis=-1)[..., : like_BxF.shape[-1]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4(Quantised):
    """Four bits a weight, one scale for each 64 inputs of an output: 4.5 bits, or 4.13 with scales
    in eight bits.

    The blocks are those of QLoRA, whose matrices lie transposed; the last may be shorter. Error of
    a weight: at most half the widest gap of the table, 0.152 of the largest weight of its block,
    and rounding. A kernel that came from float32 scales goes through unchanged.

    Attributes:
      codes_PxF: uint8 [..., ceil(D / 2), F]; an input of even index in the low four bits, the
        next in the high ones.
      scales_BxF: float32 [..., ceil(D / 64), F], the largest magnitude of each block; or in
        eight bits.
      inputs: D.
    """

    codes_PxF: jax.Array
    scales_BxF: jax.Array | Scales8
    inputs: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, kernel_DxF: jax.Array, *, double: bool = False) -> Self:
        """Rounds a finite kernel [..., D, F] to the nearest values of the table.

        Args:
          kernel_DxF: the kernel.
          double: whether the scales are quantised as well. Weights are rounded under the scales
            that they will be read with.
        """
        kernel_DxF = jnp.asarray(kernel_DxF, jnp.float32)
        *leading, inputs, outputs = kernel_DxF.shape
        padded = _padded(kernel_DxF, BLOCK).reshape(*leading, -1, BLOCK, outputs)
        exact_BxF = largest(padded, axis=-2)[..., 0, :]
        scales = Scales8.of(exact_BxF) if double else exact_BxF
        used_BxF = scales.dequantised() if isinstance(scales, Scales8) else scales
        relative_DxF = kernel_DxF / nonzero(_for_inputs(used_BxF, inputs))
        codes_DxF = sum(
            ((relative_DxF > middle).astype(jnp.uint8) for middle in _BETWEEN),
            start=jnp.zeros(kernel_DxF.shape, jnp.uint8),
        )
        pairs = _padded(codes_DxF, 2).reshape(*leading, -1, 2, outputs)
        codes_PxF = pairs[..., 0, :] | (pairs[..., 1, :] << np.uint8(4))
        return cls(codes_PxF, scales, inputs)

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, _, outputs = self.codes_PxF.shape
        return (*leading, self.inputs, outputs)

    def dequantised(self) -> jax.Array:
        scales = self.scales_BxF
        scales_BxF = scales.dequantised() if isinstance(scales, Scales8) else scales
        *leading, pairs, outputs = self.codes_PxF.shape
        shifts_2x1 = np.array([[0], [4]], np.uint8).reshape(*([1] * len(leading)), 1, 2, 1)
        codes = (self.codes_PxF[..., None, :] >> shifts_2x1) & np.uint8(15)
        codes_DxF = codes.reshape(*leading, 2 * pairs, outputs)[..., : self.inputs, :]
        # Four bits are always within the table, so that nothing need be checked.
        values_DxF = jnp.asarray(TABLE).at[codes_DxF].get(mode="promise_in_bounds")
        return values_DxF * _for_inputs(scales_BxF, self.inputs)


def _for_inputs(scales_BxF: jax.Array, inputs: int) -> jax.Array:
    """Each block's scale for each of its inputs."""
    return jnp.repeat(scales_BxF, BLOCK, axis=-2)[..., :inputs, :]


def _padded(x_DxF: jax.Array, unit: int) -> jax.Array:
    """With zeros, up to a multiple of the unit."""
    missing = -x_DxF.shape[-2] % unit
    return jnp.pad(x_DxF, [(0, 0)] * (x_DxF.ndim - 2) + [(0, missing), (0, 0)])
