"""Floats as bounded integers, so that a sum is exact and does not depend on its order.

| symbol | name | meaning |
|---|---|---|
| b | ``bits`` | bits of one integer, sign included |
| M | ``max_int`` | 2^(b-1) - 1 |
| c | ``bound`` | bound of one coordinate's absolute value |
| d | ``step`` | the smallest power of two with d >= c / M |
| n | ``summands`` | most clients of one sum |
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import Refused, UserError

# Never a valid integer (M is below 2^30), so that every secure sum refuses it by its bound.
OUT_OF_BOUND = -(2**31)
# Steps beyond these would meet float32's subnormals, which some devices flush to zero.
_SMALLEST_STEP, _LARGEST_BOUND = 2.0**-100, 2.0**100


@dataclass(frozen=True)
class FixedPoint:
    """Rounding to multiples of a power of two.

    Formal guarantee. For float32 x with abs(x) <= c:

    1. abs(encode(x)) <= M. Proof: x / d is exact, being a product with a power of two; it is at
       most c / d <= M, and rounding to nearest does not pass an integer.
    2. A sum of n encodings is at most n M in absolute value, checked to be below 2^63 here, so
       int64 sums do not wrap (nor int32 sums, if ``fits_int32``).
    3. abs(d encode(x) - x) <= d / 2, hence the mean of n decoded vectors is off by at most d / 2.

    | x | encode(x) |
    |---|---|
    | 0, -0 | 0 |
    | exactly between two multiples | the even one |
    | subnormal | 0 |
    | beyond the bound, infinite, NaN | ``OUT_OF_BOUND``, which every secure sum refuses |
    """

    bits: int
    bound: float
    summands: int

    def __post_init__(self) -> None:
        """Checks that the guarantee can hold."""
        if not 2 <= self.bits <= 31:
            raise UserError(f"bits must be in [2, 31], got {self.bits}")
        if self.summands < 1:
            raise UserError(f"summands must be at least 1, got {self.summands}")
        if not (math.isfinite(self.bound) and 0 < self.bound <= _LARGEST_BOUND):
            raise UserError(f"bound must be in (0, 2^100], got {self.bound}")
        if self.step < _SMALLEST_STEP:
            raise UserError(f"bound {self.bound} is too small for {self.bits} bits in float32")
        if self.summands * self.max_int >= 2**63:
            raise UserError(
                f"{self.summands} summands of {self.bits} bits overflow int64; use fewer of either"
            )

    @property
    def max_int(self) -> int:
        """M, the largest absolute value of an encoding."""
        return 2 ** (self.bits - 1) - 1

    @property
    def step(self) -> float:
        """d. A power of two costs up to one bit and makes scaling exact on every device."""
        mantissa, exponent = math.frexp(self.bound / self.max_int)
        step = math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)
        # The division may have rounded down.
        return step if step * self.max_int >= self.bound else 2 * step

    @property
    def fits_int32(self) -> bool:
        """Whether sums of ``summands`` encodings fit int32."""
        return self.summands * self.max_int < 2**31

    def encode(self, x: jax.Array) -> jax.Array:
        """float32 of any shape -> int32 of that shape; pure, for ``jit`` and ``vmap``."""
        inside = jnp.abs(x) <= jnp.float32(self._bound32)
        scaled = jnp.round(jnp.where(inside, x, jnp.float32(0)) * jnp.float32(1 / self.step))
        return jnp.where(inside, scaled.astype(jnp.int32), jnp.int32(OUT_OF_BOUND))

    @property
    def _bound32(self) -> float:
        """The largest float32 that is not above the bound."""
        nearest = np.float32(self.bound)
        below = np.nextafter(nearest, np.float32(0))
        return float(nearest if float(nearest) <= self.bound else below)

    def decode(self, total: NDArray[np.int64]) -> NDArray[np.float32]:
        """A sum of encodings -> the sum of floats: exact in float64, rounded once to float32."""
        return self.decode64(total).astype(np.float32)

    def decode64(self, total: NDArray[np.int64]) -> NDArray[np.float64]:
        """As ``decode``, without the last rounding; exact for sums below 2^53."""
        return np.asarray(total, np.int64).astype(np.float64) * self.step

    def clip_norm_before_rounding(self, clip_norm: float, parameters: int) -> float:
        """The l2 norm to clip to so that the *rounded* vector's norm is at most ``clip_norm``.

        Formal guarantee: norm(x) <= C - d sqrt(P) / 2 implies norm(d encode(x)) <= C. Proof: by
        (3) the rounding error has P coordinates of at most d / 2, hence norm at most
        d sqrt(P) / 2; the triangle inequality does the rest. So the sensitivity that noise is
        calibrated to holds for what is really sent.

        Args:
            clip_norm: C, the sensitivity that the privacy plan promises.
            parameters: P, the length of the vector.

        Raises:
            Refused: rounding alone can use up the whole norm.
        """
        reduced = clip_norm - self.step * math.sqrt(parameters) / 2
        if not reduced > 0:
            raise Refused(
                f"rounding {parameters} parameters to steps of {self.step:g} can move the update "
                f"by more than the clip norm {clip_norm:g}; use more bits per parameter"
            )
        return reduced
