"""A clip norm that follows a quantile of the norms, privately (arXiv 1905.03871).

| symbol | name in code | meaning |
|---|---|---|
| C | `clip_norm` | the clip norm in force |
| gamma | `quantile` | share of units that are to be left unshortened |
| eta_C | `learning_rate` | of the geometric update |
| b_i - 1/2 | `indicator` | whether unit i's norm is within C |
| sigma_b | `count_stddev` | of the noise on the sum of the indicators |
| z | `noise_multiplier` | of the joint mechanism, which the accountant sees |
| z_delta | `split_noise` | of the sum of clipped trees alone |
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.errors import UserError

# The norm stays where its square, and a division by it, are normal float32.
_LOWEST, _HIGHEST = 2.0**-60, 2.0**60


class AdaptiveClipState(NamedTuple):
    """What is carried from one step to the next; it follows from noised counts alone.

    Attributes:
        clip_norm: [] float32.
    """

    clip_norm: jax.Array


def indicator(norm: jax.Array, bound: jax.Array | float) -> jax.Array:
    """1/2 for a norm within the bound and -1/2 for one beyond, float32, elementwise.

    The paper counts b_i in {0, 1} and takes 1/2 off in its analysis (theorem 1). Here 1/2 is off
    at once: a unit that is added or removed then moves the sum by exactly 1/2, not by up to 1, and
    half the noise suffices.

    Formal guarantee: the result is 1/2 or -1/2 for every input.

    | norm           | result |
    |----------------|--------|
    | at most bound  | 1/2    |
    | above, or inf  | -1/2   |
    | NaN (either)   | -1/2   |
    """
    within = jnp.asarray(norm, jnp.float32) <= jnp.asarray(bound, jnp.float32)
    return jnp.where(within, jnp.float32(0.5), jnp.float32(-0.5))


def split_noise(noise_multiplier: float, count_stddev: float) -> float:
    """Noise multiplier z_delta for the sum, so that sum and count together have that of z.

    z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2), theorem 1 of arXiv 1905.03871.

    Formal guarantee: release a sum of l2 sensitivity S with Gaussian noise of standard deviation
    z_delta S, and a sum of indicators of sensitivity 1/2 with noise of standard deviation sigma_b,
    both independent. Over their noise, one unit moves the pair by at most
    sqrt(1 / z_delta^2 + 1 / (2 sigma_b)^2) = 1 / z: it is one Gaussian mechanism of noise
    multiplier z, for any S, hence also for one that follows from earlier releases. The result is
    rounded up, so that the multiplier is z or more.

    Args:
        noise_multiplier: z, positive; what the accountant is told.
        count_stddev: sigma_b, in units; the paper recommends a twentieth of the expected units.

    Raises:
        UserError: an argument is not positive and finite; sigma_b is not above z / 2, when the
            count alone reveals more than the joint mechanism may.
    """
    for name, value in (("noise multiplier", noise_multiplier), ("count_stddev", count_stddev)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be positive and finite, got {value:g}")
    # 1 - (z / 2 sigma_b)^2: as a product it does not cancel, by quotients it does not overflow.
    half = noise_multiplier / 2
    left = (count_stddev - half) / count_stddev * (1 + half / count_stddev)
    if not left > 0:
        raise UserError(
            f"count_stddev must be above half the noise multiplier {noise_multiplier:g}, got "
            f"{count_stddev:g}: the count alone would cost more than the whole; raise count_stddev"
        )
    return noise_multiplier / math.sqrt(left) * (1 + 2.0**-50)


@dataclass(frozen=True)
class AdaptiveClip:
    """Moves the clip norm towards a quantile of the units' norms by a noised count.

    A step: clip every unit's tree to `clip_norm` and sum; sum `indicator(norm, clip_norm)` of the
    norms before clipping; add noise of `sum_noise_multiplier(z)` times the sensitivity to the one
    and of `count_stddev` to the other; `update` with the noised count.

    Formal guarantee: `update` reads nothing but the state and a noised count, so the state is
    post-processing of what was released, and every step is one mechanism of noise multiplier z (see
    `split_noise`), composed adaptively with those before it. The initial norm, the quantile, the
    learning rate, the expected number of units and sigma_b are public.

    Attributes:
        initial_norm: C of the first step.
        quantile: gamma in (0, 1); the paper recommends 0.5.
        learning_rate: eta_C; the norm changes by a factor of about exp(eta_C) at most (noise can
            take it further); the paper recommends 0.2.
        count_stddev: sigma_b, in units.

    Raises:
        UserError: a value is not positive and finite, the quantile not in (0, 1), or the initial
            norm outside [2^-60, 2^60].
    """

    initial_norm: float
    quantile: float
    learning_rate: float
    count_stddev: float

    def __post_init__(self) -> None:
        for name in ("learning_rate", "count_stddev"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"{name} must be positive and finite, got {value:g}")
        if not 0 < self.quantile < 1:
            raise UserError(f"quantile must be in (0, 1), got {self.quantile:g}")
        if not _LOWEST <= self.initial_norm <= _HIGHEST:
            raise UserError(
                f"initial_norm must be in [2^-60, 2^60], got {self.initial_norm:g}; change the unit"
            )

    def init(self) -> AdaptiveClipState:
        """The state before the first step."""
        return AdaptiveClipState(jnp.float32(self.initial_norm))

    def sum_noise_multiplier(self, noise_multiplier: float) -> float:
        """`split_noise` of the joint mechanism's multiplier and this `count_stddev`."""
        return split_noise(noise_multiplier, self.count_stddev)

    def update(
        self,
        state: AdaptiveClipState,
        noised_count: jax.Array | float,
        expected_units: jax.Array | float,
    ) -> AdaptiveClipState:
        """C exp(-eta_C (b - gamma)), where b is the noised share of units within C.

        b = noised_count / expected_units + 1/2, whose expectation under Poisson sampling is the
        share among all units. The divisor is the public expected number, as for the sum: the
        realised one is not public. An empty sample reads as a share of 1/2.

        | input                                   | clip norm after                  |
        |-----------------------------------------|----------------------------------|
        | every unit within C, no noise           | shrinks by exp(-eta_C (1 - gamma))|
        | no unit within C, no noise              | grows by exp(eta_C gamma)        |
        | a count or an expectation that gives no finite share | unchanged           |
        | would leave [2^-60, 2^60]               | the end of that interval         |

        Args:
            state: of this step.
            noised_count: [] float32, the sum of the indicators with noise.
            expected_units: public, positive; units that are expected to take part in a step.
        """
        share = jnp.asarray(noised_count, jnp.float32) / jnp.asarray(expected_units, jnp.float32)
        share += jnp.float32(0.5)
        step = jnp.exp(-jnp.float32(self.learning_rate) * (share - jnp.float32(self.quantile)))
        moved = jnp.clip(state.clip_norm * step, jnp.float32(_LOWEST), jnp.float32(_HIGHEST))
        return AdaptiveClipState(jnp.where(jnp.isfinite(share), moved, state.clip_norm))
