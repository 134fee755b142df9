"""What makes local steps private: how examples are clipped, and the noise of their steps."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import AdaptiveClip, Clip, Correlation, gaussian_noise_like

PyTree = Any
# Folded into a step's noise key for the noise on the count of an adaptive clip norm.
_COUNT = 2**32 - 1


@dataclass(frozen=True)
class ExamplePrivacy:
    """Per-example clipping and noise inside each local step (DP-SGD, arXiv 1607.00133).

    Attributes:
        clip_norm: largest l2 norm of one example's gradient; or a kind of clipping.
        noise_multiplier: standard deviation of the noise on the summed gradient, in units of the
            sensitivity of the clipping.
        correlation: how the noise of different steps hangs together; None is independent noise.
        period: a row's turn comes every so many steps of the run; see `ClientTable.turns`.
        adaptive: the clip norm follows a private quantile, from its own initial norm on; None keeps
            it. The noise multiplier is then that of sum and count together.
        method: how the clipped sum is computed; "ghost" never holds the gradients of examples, and
            takes plain factors of one rank.
    """

    clip_norm: float | Clip
    noise_multiplier: float
    correlation: Correlation | None = None
    period: int = 1
    adaptive: AdaptiveClip | None = None
    method: Literal["vmap", "ghost"] = "vmap"

    def __post_init__(self) -> None:
        """Raises UserError for an adaptive norm with a kind, or noise, that it does not go with."""
        if self.adaptive is None:
            return
        if self.adaptive.initial_norm != self.clip_norm:
            raise UserError(
                f"the adaptive clip norm begins at {self.adaptive.initial_norm:g} and clip_norm is "
                f"{self.clip_norm}; make them equal, one joint norm"
            )
        if self.correlation is not None:
            raise UserError(
                "correlated noise takes off earlier noise of the same size, and an adaptive clip "
                "norm changes it; choose one of the two"
            )

    @property
    def sensitivity(self) -> float:
        """Largest l2 change of a step's sum when one example is added or removed, to begin with."""
        if isinstance(self.clip_norm, int | float):
            return float(self.clip_norm)
        return float(self.clip_norm.sensitivity)

    def clip_state(self) -> PyTree:
        """What an adaptive clip norm begins with; () without."""
        return () if self.adaptive is None else self.adaptive.init()


class NoiseStream(NamedTuple):
    """What correlated noise needs of the rounds before.

    Attributes:
        first: int32 scalar, the steps of the run before this round.
        last_key: the client's noise key of the round before.
        state: of the correlation.
        clip: of the adaptive clip norm.
    """

    first: jax.Array
    last_key: jax.Array
    state: PyTree
    clip: PyTree = ()


class StepNoise(NamedTuple):
    """The noise of a client's local steps in one round."""

    privacy: ExamplePrivacy | None
    steps: int
    key: jax.Array
    last_key: jax.Array
    first: jax.Array
    state: PyTree
    clip: PyTree

    @classmethod
    def of(
        cls,
        privacy: ExamplePrivacy | None,
        steps: int,
        like: PyTree,
        key: jax.Array,
        stream: NoiseStream | None,
    ) -> "StepNoise":
        """The noise of a round.

        Args:
            privacy: of the steps, or None.
            steps: of a round.
            like: a tree shaped like the noise.
            key: the client's noise key of the round.
            stream: what is left of the rounds before; a run begins if None.
        """
        if stream is not None:
            return cls(
                privacy, steps, key, stream.last_key, stream.first, stream.state, stream.clip
            )
        if privacy is None:
            return cls(privacy, steps, key, key, jnp.int32(0), (), ())
        state = () if privacy.correlation is None else privacy.correlation.init(like)
        return cls(privacy, steps, key, key, jnp.int32(0), state, privacy.clip_state())

    def next(
        self, step: jax.Array, like: PyTree, state: PyTree, clip: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The noise on the sum of a step."""
        privacy, steps = self.privacy, self.steps
        assert privacy is not None
        stddev: float | jax.Array = privacy.noise_multiplier * privacy.sensitivity
        if privacy.adaptive is not None:
            split = privacy.adaptive.sum_noise_multiplier(privacy.noise_multiplier)
            stddev = jnp.float32(split) * clip.clip_norm

        def draw(index: jax.Array) -> PyTree:
            place = index - self.first
            own = jax.random.fold_in(self.key, place)
            if privacy.correlation is None:
                return gaussian_noise_like(own, like, stddev)
            last = jax.random.fold_in(self.last_key, place + steps)
            return gaussian_noise_like(jnp.where(place >= 0, own, last), like, stddev)

        if privacy.correlation is None:
            return draw(self.first + step), state
        return privacy.correlation.next(self.first + step, draw, state)

    def next_norm(
        self,
        step: jax.Array,
        clip: PyTree,
        rows: jax.Array,
        clipped: jax.Array,
        size: int | jax.Array,
    ) -> PyTree:
        """The adaptive clip norm after a step, from the noised count of rows within the last.

        `size` is the client's expected batch, which divides the count; a public number.
        """
        privacy = self.privacy
        assert privacy is not None
        if privacy.adaptive is None:
            return clip
        # A number that no leaf of the sum's noise is addressed by.
        key = jax.random.fold_in(jax.random.fold_in(self.key, step), _COUNT)
        noise = jnp.float32(privacy.adaptive.count_stddev) * jax.random.normal(key, (), jnp.float32)
        # Every row within the norm counts 1/2, every other one -1/2.
        count = rows * jnp.float32(0.5) - clipped
        return privacy.adaptive.update(clip, count + noise, size)
