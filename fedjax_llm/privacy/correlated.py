"""Noise that hangs together over the steps of a run, so that later noise takes off earlier noise.

The matrix mechanism: T sums g_1 .. g_T are released with noise C^-1 z, where z is independent
Gaussian noise and C a lower triangular T x T matrix. Released is C^-1 (C g + z), so the guarantee
is that of one Gaussian mechanism on C g; and the running sum of the noise, which is what training
feels, is smaller than that of T independent draws.

Here C is a Toeplitz matrix of non-negative, non-increasing coefficients c_0, c_1, .. whose columns
are divided by their norms: one participation moves C g by at most the clip norm.

Notation: T steps of the run, b the period with which a unit's turn to take part comes round.
"""

import contextlib
import functools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fedjax_llm.errors import UserError

PyTree = Any
Draw = Callable[[jax.Array], PyTree]

# Coefficients come from a numerical search; on this grid they are the same on every machine.
_GRID = 2.0**-16


class Correlation(ABC):
    """How the noise of different steps hangs together.

    Formal guarantee: let a unit take part only in steps whose numbers differ by multiples of b, in
    each of them at most once with a vector of l2 norm at most C, and let z have standard deviation
    z0 C. Then the sums with the noise of `next`, over all steps and chosen adaptively, are as
    private as one Gaussian mechanism of noise multiplier z0 / `sensitivity(b)`
    (arXiv 2202.08312, theorem 2.1, for adaptive streams; 2306.08153, equation 5). If no column of C
    overlaps another one that the same unit may use (`bands` <= b), they are as private as
    ceil(T / b) mechanisms of noise multiplier z0, one after the other, each of which may also
    profit from sampling at random (2306.08153, theorem 4). Steps that are computed and not released
    take nothing away.

    Attributes:
        steps: T.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    steps: int

    @property
    @abstractmethod
    def bands(self) -> int:
        """Steps that one draw reaches: how many coefficients are not zero."""

    @abstractmethod
    def coefficients(self) -> NDArray[np.float64]:
        """c_0 .. c_(T-1), float64; c_0 above zero, none above the one before."""

    @abstractmethod
    def init(self, like: PyTree) -> PyTree:
        """What is kept from step to step, for noise shaped like a tree; () where nothing is."""

    @abstractmethod
    def _solve(self, index: jax.Array, draw: Draw, state: PyTree) -> tuple[PyTree, PyTree]:
        """Row `index` of the inverse Toeplitz matrix times z, and the new state."""

    def next(self, index: jax.Array, draw: Draw, state: PyTree) -> tuple[PyTree, PyTree]:
        """The noise of one step. Steps are taken in order, none left out.

        Args:
            index: int32 scalar, from 0; may be traced.
            draw: the independent noise of a step, addressed by its number: the same every time.
            state: from `init`, or from the step before.

        Returns:
            The noise and the state for the next step.
        """
        noise, state = self._solve(index, draw, state)
        norm = jnp.asarray(self.column_norms, jnp.float32)[index]
        return jax.tree.map(lambda leaf: leaf * norm, noise), state

    @cached_property
    def column_norms(self) -> NDArray[np.float64]:
        """Norms [T] of the columns before they are divided by them; the last are the shortest."""
        return np.asarray(np.sqrt(np.cumsum(np.square(self.coefficients())))[::-1])

    def sensitivity(self, period: int, steps: int | None = None) -> float:
        """l2 norm of C times the contributions of a unit that takes part every `period` steps.

        All entries of C are non-negative, so the worst contributions all point the same way, and
        none that is left out makes it larger.

        Args:
            period: b.
            steps: of the first so many steps; of all if None.
        """
        count = self.steps if steps is None else min(steps, self.steps)
        if self.bands <= period:
            return math.sqrt(-(-count // period))
        coefficients, norms = self.coefficients()[:count], self.column_norms[:count]
        worst = 0.0
        for first in range(min(period, count)):
            turns = np.zeros(count)
            turns[first::period] = 1 / norms[first::period]
            moved = _convolved(turns, coefficients)[:count]
            worst = max(worst, float(np.sqrt(np.sum(np.square(moved)))))
        return worst

    def root_mean_square(self) -> float:
        """Error of the running sums, root mean square over the steps, for z of deviation one.

        Without correlation it is sqrt((T + 1) / 2).
        """
        inverse = _inverse(self.coefficients())
        # Row t of A C^-1 is the sum of rows up to t, each times its column's norm.
        total, rows = 0.0, np.zeros(self.steps)
        for step in range(self.steps):
            rows[: step + 1] += self.column_norms[step] * inverse[: step + 1][::-1]
            total += float(np.sum(np.square(rows)))
        return math.sqrt(total / self.steps)


@dataclass(frozen=True)
class Independent(Correlation):
    """No correlation: DP-SGD (arXiv 1607.00133)."""

    steps: int

    name: ClassVar[str] = "independent"
    source: ClassVar[str] = "arXiv 1607.00133"
    bands: ClassVar[int] = 1

    def coefficients(self) -> NDArray[np.float64]:
        return np.eye(1, self.steps)[0]

    def init(self, like: PyTree) -> PyTree:
        return ()

    def _solve(self, index: jax.Array, draw: Draw, state: PyTree) -> tuple[PyTree, PyTree]:
        return draw(index), state

    def next(self, index: jax.Array, draw: Draw, state: PyTree) -> tuple[PyTree, PyTree]:
        return draw(index), state


@dataclass(frozen=True)
class LambdaCgd(Correlation):
    """DP-lambda-CGD (arXiv 2601.22334): every step takes off a part of the last one's noise.

    C has coefficients 1, lambda, lambda^2, .., so that its inverse has two bands: the noise of step
    t is z_t - lambda z_(t-1), times the norm of column t. The last draw is made again from its
    key: nothing is kept.

    Attributes:
        steps: T.
        cancelled: lambda, in [0, 1).
    """

    steps: int
    cancelled: float

    name: ClassVar[str] = "lambda-cgd"
    source: ClassVar[str] = "arXiv 2601.22334"

    def __post_init__(self) -> None:
        if not 0 <= self.cancelled < 1:
            raise UserError(
                f"lambda of the cancelled noise must be in [0, 1), got {self.cancelled:g}"
            )

    @property
    def bands(self) -> int:
        return self.steps if self.cancelled else 1

    def coefficients(self) -> NDArray[np.float64]:
        return np.power(self.cancelled, np.arange(self.steps, dtype=np.float64))

    def init(self, like: PyTree) -> PyTree:
        return ()

    def _solve(self, index: jax.Array, draw: Draw, state: PyTree) -> tuple[PyTree, PyTree]:
        again = jnp.where(index > 0, jnp.float32(self.cancelled), jnp.float32(0))
        noise = jax.tree.map(lambda new, old: new - again * old, draw(index), draw(index - 1))
        return noise, state


@dataclass(frozen=True)
class Banded(Correlation):
    """BandMF (arXiv 2306.08153), banded Toeplitz (2405.15913): b bands, b - 1 draws kept.

    The coefficients are those of jax-privacy's search for the least mean error of running sums.

    Attributes:
        steps: T.
        width: bands; 1 is independent noise.
    """

    steps: int
    width: int

    name: ClassVar[str] = "banded"
    source: ClassVar[str] = "arXiv 2306.08153"

    def __post_init__(self) -> None:
        if not 1 <= self.width <= self.steps:
            raise UserError(
                f"bands must be between 1 and {self.steps}, the steps of the run, got {self.width}"
            )
        _banded(self.steps, self.width)  # searched for now: it cannot be while a program is traced

    @property
    def bands(self) -> int:
        return self.width

    def coefficients(self) -> NDArray[np.float64]:
        return np.pad(_banded(self.steps, self.width), (0, self.steps - self.width))

    def init(self, like: PyTree) -> PyTree:
        return self._stream.init_multiply(like)

    def _solve(self, index: jax.Array, draw: Draw, state: PyTree) -> tuple[PyTree, PyTree]:
        noise, state = self._stream.multiply_next(draw(index), state)
        return noise, state

    @property
    def _stream(self) -> Any:
        from jax_privacy.matrix_factorization import toeplitz

        coefficients = jnp.asarray(_banded(self.steps, self.width), jnp.float32)
        return toeplitz.inverse_as_streaming_matrix(coefficients)


@dataclass(frozen=True)
class Buffered(Correlation):
    """A buffered linear Toeplitz matrix, BLT (arXiv 2404.16706, 2408.08868): a few buffers kept.

    Coefficient c_i is the sum over buffers of scale times decay^(i - 1), and c_0 is one. They are
    those of jax-privacy's search for units that take part every `period` steps.

    Attributes:
        steps: T.
        buffers: trees that are kept.
        period: b, of the participations that it is made for; any can be accounted for.
    """

    steps: int
    buffers: int
    period: int = 1

    name: ClassVar[str] = "buffered"
    source: ClassVar[str] = "arXiv 2408.08868"

    def __post_init__(self) -> None:
        if not 1 <= self.buffers <= 10:
            raise UserError(f"buffers must be between 1 and 10, got {self.buffers}")
        if self.period < 1:
            raise UserError(f"the period must be at least 1, got {self.period}")
        _, scales = _buffered(self.steps, self.buffers, self.period)
        if not any(scales):
            raise UserError(
                f"for turns every {self.period} steps of {self.steps} the search finds no buffered "
                'noise better than independent one; use noise "gaussian", or a longer period'
            )

    @property
    def bands(self) -> int:
        return int(np.flatnonzero(self.coefficients())[-1]) + 1

    def coefficients(self) -> NDArray[np.float64]:
        decays, scales = _buffered(self.steps, self.buffers, self.period)
        powers = np.power(np.asarray(decays)[:, None], np.arange(self.steps - 1)[None])
        return np.concatenate([[1.0], np.asarray(scales) @ powers])

    def init(self, like: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.zeros((self.buffers, *leaf.shape)), like)

    def _solve(self, index: jax.Array, draw: Draw, state: PyTree) -> tuple[PyTree, PyTree]:
        """Algorithm 3 of arXiv 2408.08868."""
        decays, scales = (
            jnp.asarray(x, jnp.float32) for x in _buffered(self.steps, self.buffers, self.period)
        )
        noise = jax.tree.map(
            lambda new, held: new - jnp.tensordot(scales, held, axes=1), draw(index), state
        )

        def decayed(held: jax.Array, new: jax.Array) -> jax.Array:
            return held * decays.reshape(-1, *[1] * new.ndim) + new[None]

        return noise, jax.tree.map(decayed, state, noise)


@functools.cache
def _banded(steps: int, width: int) -> NDArray[np.float64]:
    from jax_privacy.matrix_factorization import toeplitz

    if width == 1:
        return np.ones(1)
    with _lenient():
        found = np.asarray(toeplitz.optimize_banded_toeplitz(n=steps, bands=width), np.float64)
    found = np.round(found / found[0] / _GRID) * _GRID
    return np.asarray(np.minimum.accumulate(np.maximum(found, 0.0)))


@functools.cache
def _buffered(steps: int, buffers: int, period: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Decays and scales, on the grid."""
    from jax_privacy.matrix_factorization import buffered_toeplitz

    if steps == 1:
        return (0.0,) * buffers, (0.0,) * buffers
    with _lenient(), jax.enable_x64(True):
        try:
            found = buffered_toeplitz.optimize(
                n=steps,
                min_sep=period,
                max_participations=None,
                error="mean",
                min_buffers=buffers,
                max_buffers=buffers,
            )
        except (RuntimeError, ValueError, FloatingPointError):
            raise UserError(
                f"the search for {buffers} buffers over {steps} steps does not converge; use fewer "
                "buffers"
            ) from None
        decays, scales = np.asarray(found.buf_decay), np.asarray(found.output_scale)
    decays, scales = (np.round(x / _GRID) * _GRID for x in (decays, scales))
    return tuple(decays.tolist()), tuple(scales.tolist())


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """JAX's own promotion of types and ranks, which the searches count on; no word of theirs."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    finally:
        log.setLevel(level)


def _convolved(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(x) < 512:
        return np.convolve(x, y)
    from scipy import signal

    return np.asarray(signal.fftconvolve(x, y))


def _inverse(coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients of the inverse Toeplitz matrix."""
    from scipy import signal

    impulse = np.eye(1, len(coefficients))[0]
    return np.asarray(signal.lfilter([1.0], coefficients, impulse))
