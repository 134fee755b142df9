"""Canaries: units whose presence in a run is a coin toss that an auditor then tries to read.

A canary is a worst case. Its contribution, before the clip, is `scale * v_i` with v_i a unit
vector of its own and `scale` far above the clip norm, so that what it adds is as long as a
contribution can be, and longer than it may be where a clip is missing.

One-run auditing puts many canaries into one run, and one-run bounds suffer where canaries disturb
each other (arXiv 2503.07199, section 5): random directions in P dimensions overlap by about
1 / sqrt(P), which in a small adapter drowns a canary among a thousand others. The directions here
do not overlap at all: they are rows of a Walsh-Hadamard matrix over randomly chosen coordinates,
times random signs. Each of them alone is a uniformly random vector of signs; any two are
orthogonal. Nothing but one vector of P places is stored, a direction takes O(P) to write down, and
the scores of all canaries take one fast transform.

Letters: M canaries, P parameters of a tree, W = 2^k the largest power of two that is at most P,
N rows of a client's table.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedjax_llm.errors import UserError
from fedjax_llm.training import ClientTable

PyTree = Any
RowLoss = Callable[[PyTree, PyTree], jax.Array]

# No canary but a real unit.
REAL = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Canaries:
    """M orthogonal worst-case contributions; a pytree, so that it can be an argument of `jit`.

    Attributes:
        places_P: int32, the column of the Walsh-Hadamard matrix that stands at each coordinate of
            the flattened tree; W and above for the coordinates that no direction uses.
        signs_P: float32, 1 or -1.
        count: M.
        scale: l2 norm of a contribution before the clip, in the unit of the tree.
    """

    places_P: jax.Array
    signs_P: jax.Array
    count: int = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})

    @classmethod
    def draw(cls, key: jax.Array, tree: PyTree, count: int, scale: float) -> "Canaries":
        """Draws the directions.

        Args:
            key: a JAX key that is used for nothing else.
            tree: what contributions look like, of P parameters; only its size is read.
            count: M.
            scale: see `Canaries`.

        Raises:
            UserError: no canary, more canaries than orthogonal directions, or a scale that is not
                positive and finite.
        """
        size = sum(leaf.size for leaf in jax.tree.leaves(tree))
        most = _width(size)
        if not 1 <= count <= most:
            raise UserError(
                f"canaries must be between 1 and {most}, the orthogonal directions of "
                f"{size} parameters, got {count}; use fewer, or an adapter of a higher rank"
            )
        if not 0 < scale < float("inf"):
            raise UserError(f"scale of canaries must be positive and finite, got {scale:g}")
        places, signs = jax.random.split(key)
        places_P = jax.random.permutation(places, jnp.arange(size, dtype=jnp.int32))
        signs_P = jax.random.rademacher(signs, (size,), jnp.float32)
        return cls(places_P, signs_P, count, float(scale))

    @property
    def width(self) -> int:
        """W, the coordinates that every direction uses."""
        return _width(self.places_P.size)

    def direction(self, number: jax.Array | int) -> jax.Array:
        """v_i, float32 [P], of norm one up to 2^-23; `number` is i, an int32 scalar in [0, M)."""
        common_P = jnp.bitwise_and(self.places_P, jnp.asarray(number, jnp.int32))
        odd_P = jnp.bitwise_and(jax.lax.population_count(common_P), jnp.int32(1))
        walsh_P = jnp.float32(1) - jnp.float32(2) * odd_P.astype(jnp.float32)
        height = jnp.float32(self.width**-0.5)
        return jnp.where(self.places_P < self.width, self.signs_P * walsh_P * height, 0.0)

    def contribution(self, number: jax.Array | int, like: PyTree) -> PyTree:
        """`scale * v_i` in the shape of `like`: with unit client, the message before the clip."""
        flat_P, unravel = ravel_pytree(like)
        del flat_P
        return unravel(jnp.float32(self.scale) * self.direction(number))

    def project(self, released: PyTree) -> jax.Array:
        """<released, v_i> for all i, float32 [M], in O(P log P) and without any direction.

        Args:
            released: a tree of P parameters that an observer saw.
        """
        flat_P = ravel_pytree(released)[0].astype(jnp.float32) * self.signs_P
        # Out of bounds are the coordinates that no direction uses; they are dropped.
        spectrum_W = jnp.zeros(self.width, jnp.float32).at[self.places_P].set(flat_P, mode="drop")
        half = self.width // 2
        while half:
            pairs = spectrum_W.reshape(-1, 2, half)
            spectrum_W = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
            half //= 2
        return spectrum_W.reshape(-1)[: self.count] * jnp.float32(self.width**-0.5)


def _width(size: int) -> int:
    return 1 << max(size.bit_length() - 1, 0)


def toss(key: jax.Array, count: int) -> jax.Array:
    """Which canaries take part: bool [M], independent fair coins."""
    return jax.random.bits(key, (count,), jnp.uint32) < jnp.uint32(2**31)


class CanaryRow(NamedTuple):
    """A row of a client's table that may be a canary.

    Attributes:
        row: what the row loss reads; zeros for a canary.
        canary: int32 scalar, the canary's number, or `REAL`.
    """

    row: PyTree
    canary: jax.Array


def with_canaries(row_loss: RowLoss, canaries: Canaries) -> RowLoss:
    """The row loss on rows of which some are canaries, for any code that trains on rows.

    The loss of canary i is `scale * <trainable, v_i>`: its gradient is `scale * v_i` whatever the
    parameters are, and depends on no other row. For a real row it is `row_loss`.

    | case | effect |
    |---|---|
    | `row_loss` not finite on a row of zeros | the canary's gradient is NaN; the clip zeroes it |
    | parameters far from zero | the value, not the gradient, may be huge: ignore mean losses |

    Args:
        row_loss: `(trainable, row) -> loss`. It is evaluated, and ignored, on canaries as well,
            because a batched program computes both sides: a canary costs as much as an example.
        canaries: with P the parameters of the trainable tree.

    Returns:
        `(trainable, CanaryRow) -> loss`.
    """

    def loss(trainable: PyTree, row: CanaryRow) -> jax.Array:
        real = row_loss(trainable, row.row)
        flat_P = ravel_pytree(trainable)[0]
        number = jnp.maximum(row.canary, jnp.int32(0))
        # The product is reduced coordinate by coordinate, so its gradient is the direction itself.
        planted = jnp.float32(canaries.scale) * jnp.sum(flat_P * canaries.direction(number))
        return jnp.where(row.canary == REAL, real, planted)

    return loss


def plant(table: ClientTable, taking_part_M: jax.Array, rate: float) -> ClientTable:
    """A client's table with the canaries that take part in it.

    A canary that does not take part is not there at all: it stands behind the population. The
    sampling rate does not follow from how many take part, so that two tables that differ by one
    canary are neighbours in the sense of `PrivacyPlan`, for a number of examples that counts all M.

    Args:
        table: rows of which the first `population` are real; the others are dropped.
        taking_part_M: bool, from `toss`.
        rate: the probability with which a step takes a row.

    Returns:
        A table of `CanaryRow`, with N + M rows.
    """
    population = int(table.population)
    (numbers_K,) = jnp.nonzero(taking_part_M)
    count = taking_part_M.size

    def padded(leaf: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)[:population]
        return jnp.pad(leaf, [(0, count)] + [(0, 0)] * (leaf.ndim - 1))

    canary_N = jnp.full(population + count, REAL, jnp.int32)
    end = population + numbers_K.size
    canary_N = canary_N.at[population:end].set(numbers_K.astype(jnp.int32))
    rows = CanaryRow(jax.tree.map(padded, table.rows), canary_N)
    return ClientTable(rows, jnp.int32(end), jnp.float32(rate))
