"""From a client's change of the adapter to bounded integers, and from their sum back to a mean.

The order is the one the guarantees need: weight, clip, round. The clip comes last among the
real-valued steps so that nothing after it but rounding can lengthen the vector, and it leaves
room for the rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpy.typing import NDArray

from fedjax_llm.compression import norm_before_rounding, quantise, quantise_within, step_for
from fedjax_llm.compression.rounding import check_bits
from fedjax_llm.errors import UserError
from fedjax_llm.privacy import clip, indicator
from fedjax_llm.privacy.integer_noise import NoiseTable, draw
from fedjax_llm.secure.fixed_point import FixedPoint

PyTree = Any

# Integers of a sum stay within int32, so that they are exact on every accelerator.
_SUM_BITS = 31
# Two coordinates share a slot of mode `bfv` as long as a sum takes no more than this.
_PAIRED_SUM_BITS = 25
_COARSEST_DEFAULT = 16
# How often one draw of stochastic rounding may be longer than a strict codec allows.
_TOO_LONG = 1e-3


class Upload(NamedTuple):
    """What a client sends in one stage, in float32.

    Attributes:
        message: of the aggregation rule, weighted.
        control: change of its control variate; () without SCAFFOLD.
    """

    message: PyTree
    control: PyTree = ()


def scaled(tree: PyTree, weight: jax.Array) -> PyTree:
    """A message times a weight."""
    return jax.tree.map(lambda leaf: leaf * weight, tree)


class EncodedMessage(NamedTuple):
    """One client's message before it is encrypted.

    Attributes:
        ints_P: int32, fixed-point coordinates, each within the codec's bound.
        norm: float32, l2 norm of the weighted message before clipping; not finite if training
            diverged, that is if it holds NaN, infinity, or values whose squares float32 cannot
            hold. It depends on the client's data: with unit `client` no guarantee covers it.
        memory: what error feedback keeps at the client; () without.
    """

    ints_P: jax.Array
    norm: jax.Array
    memory: PyTree = ()


@dataclass(frozen=True)
class MessageCodec:
    """Fixed-point coding of a pytree of P float32 parameters.

    Formal guarantee: the decoded message of any client has l2 norm at most `max_norm`, whatever
    the client computed, rounding included unless it is at random and not `strict`; the tree of a
    training that diverged becomes all zeros and is reported through `EncodedMessage.norm`.

    Attributes:
        size: P.
        max_norm: largest l2 norm of a decoded message; with privacy unit `client` this is the
            sensitivity of the sum.
        fixed_point: step, bits and the proof that a sum of all clients cannot overflow.
        unravel: the inverse of flattening.
        noise: what clients draw integer noise from, which they add to their encoded messages; or
            None.
        counts: whether one more integer tells if the norm was within `max_norm`: twice the
            `indicator` of an adaptive clip norm, 1 or -1, and 0 from who takes no part.
        stochastic: whether rounding is at random, right on average; else to the nearest.
        strict: whether the rounded vector keeps the norm too. Nearest rounding always does; at
            random it costs length or draws, and is needed where the norm is a sensitivity.
    """

    size: int
    max_norm: float
    fixed_point: FixedPoint
    unravel: Callable[[jax.Array], PyTree]
    noise: NoiseTable | None = None
    counts: bool = False
    stochastic: bool = False
    strict: bool = True

    @classmethod
    def for_tree(
        cls,
        tree: PyTree,
        *,
        max_norm: float,
        bits: int,
        clients: int,
        noise: NoiseTable | None = None,
        counts: bool = False,
        reach: float | None = None,
        stochastic: bool = False,
        strict: bool = True,
    ) -> "MessageCodec":
        """Builds the codec for trees shaped like `tree`, summed over at most `clients`.

        Args:
            tree: shapes of a message.
            max_norm: see `MessageCodec`.
            bits: of an integer.
            clients: most summands.
            noise: see `MessageCodec`.
            counts: see `MessageCodec`.
            reach: largest absolute value of a number that is sent, larger ones are cut; `max_norm`,
                which none exceeds, if None.
            stochastic: see `MessageCodec`.
            strict: see `MessageCodec`.
        """
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
        flat, unravel = ravel_pytree(zeros)
        if stochastic:
            check_bits(bits)
        bound = max_norm if reach is None else reach
        fixed_point = FixedPoint(bits=bits, bound=bound, summands=clients)
        codec = cls(flat.size, max_norm, fixed_point, unravel, noise, counts, stochastic, strict)
        # Refuses here, and not when the first round is compiled, what rounding leaves no room for.
        _ = codec.room
        return codec

    @property
    def length(self) -> tuple[int, int]:
        """Integers of a message, and the bound of their absolute value, noise included."""
        own = self.fixed_point.max_int + (self.noise.bound if self.noise else 0)
        return self.size + self.counts, own

    @property
    def step(self) -> float:
        """What one integer stands for."""
        if self.stochastic:
            return step_for(self.fixed_point.bound, self.fixed_point.bits)
        return self.fixed_point.step

    @property
    def room(self) -> float:
        """The l2 norm to which messages are shortened before they are rounded."""
        if not self.stochastic:
            return self.fixed_point.clip_norm_before_rounding(self.max_norm, self.size)
        if not self.strict:
            return self.max_norm
        return norm_before_rounding(self.max_norm, self.size, self.step, _TOO_LONG)

    def encode(self, tree: PyTree, key: jax.Array | None = None) -> EncodedMessage:
        """Returns the message of a tree; pure, may be vmapped over clients.

        Args:
            tree: float32.
            key: of stochastic rounding, this client's own.
        """
        flat_P = ravel_pytree(tree)[0]
        norm = jnp.sqrt(jnp.sum(jnp.square(flat_P)))
        sound_P = jnp.where(jnp.isfinite(norm), flat_P, jnp.float32(0))
        clipped_P, _ = clip(sound_P, self.room)
        bound = jnp.float32(self.fixed_point.bound)
        cut_P = (
            clipped_P
            if self.fixed_point.bound >= self.max_norm
            else jnp.clip(clipped_P, -bound, bound)
        )
        if not self.stochastic:
            ints_P = self.fixed_point.encode(cut_P)
        elif self.strict:
            assert key is not None
            max_int = self.fixed_point.max_int
            ints_P = quantise_within(key, cut_P, self.step, max_int, self.max_norm)
        else:
            assert key is not None
            ints_P = quantise(key, cut_P, self.step, self.fixed_point.max_int)
        if self.counts:
            within = jnp.rint(2 * indicator(norm, self.max_norm)).astype(jnp.int32)
            ints_P = jnp.concatenate([ints_P, within[None]])
        return EncodedMessage(ints_P, norm)

    def sent(self, message: EncodedMessage) -> PyTree:
        """What a message says without its noise, in the length it had before it was shortened."""
        longer = jnp.maximum(jnp.float32(1), message.norm * jnp.float32(1 / self.room))
        return self.unravel(self.decode(message.ints_P) * longer)

    def share(self, key: jax.Array) -> jax.Array:
        """A client's share of the noise, int32 [P]; for simulation, see `integer_noise.draw`."""
        assert self.noise is not None
        return draw(self.noise, key, (self.size,))

    def decode(self, total_P: jax.Array) -> jax.Array:
        """Returns the integer sum in float32 units of the parameters."""
        return total_P[..., : self.size].astype(jnp.float32) * jnp.float32(self.step)

    def count(self, total_P: jax.Array) -> jax.Array:
        """The sum of the indicators, float32; in the unit of `AdaptiveClip.update`."""
        return total_P[..., self.size].astype(jnp.float32) * jnp.float32(0.5)


class WeightCodec:
    """A weight that follows from private results, as integers that add up.

    Four limbs of 16 bits hold weights from 2^-48 to below 2^16 with float32's whole precision, so
    that a sum of very unequal weights is as good as one of equal ones. Sums of fewer than 2^15
    clients fit 32 bits.

    | weight | result |
    |---|---|
    | 0 | zeros |
    | below 2^-48 | 0 |
    | 2^16 or more, NaN | -1 in the first limb, which `check` refuses by name |
    """

    LIMBS = 4
    MAX_INT = 2**16
    MOST_CLIENTS = 2**15 - 1
    length = (LIMBS, MAX_INT)
    _BITS = 16

    @classmethod
    def encode(cls, weight: jax.Array) -> jax.Array:
        """int32 [4], each limb in [0, 2^16)."""
        base = jnp.float32(2**cls._BITS)
        inside = (weight >= 0) & (weight < base)
        rest = jnp.where(inside, weight, jnp.float32(0))
        limbs = []
        for _ in range(cls.LIMBS):
            limb = jnp.floor(rest)
            limbs.append(limb.astype(jnp.int32))
            rest = (rest - limb) * base
        return jnp.where(inside, jnp.stack(limbs), jnp.array([-1, 0, 0, 0], jnp.int32))

    @classmethod
    def decode(cls, total_4: jax.Array) -> jax.Array:
        """The sum of weights in float32."""
        step = jnp.float32(2.0**-cls._BITS)
        total = jnp.float32(0)
        for limb in reversed(range(cls.LIMBS)):
            total = total * step + total_4[limb].astype(jnp.float32)
        return total

    @staticmethod
    def check(limbs_Kx4: NDArray[np.int32], names: Sequence[str], round_number: int) -> None:
        """Raises UserError for a weight that cannot be sent, or when all are zero."""
        for name, limbs in zip(names, limbs_Kx4, strict=True):
            if limbs[0] < 0:
                raise UserError(
                    f"round {round_number}: the weight of client {name!r} is not a number below "
                    '2^16, its loss or update is not finite; use weights = "uniform"'
                )
        if not np.any(limbs_Kx4):
            raise UserError(
                f"round {round_number}: the weights of all clients are zero, so that no mean "
                'exists; use weights = "uniform", or a rule that does not weigh by result'
            )


def fitting_bits(bits: int | None, clients: int) -> int:
    """Returns the bits of one coordinate such that a sum over all clients fits its place.

    Without a wish, as many as let two coordinates share a slot of mode `bfv`, but at least 16; the
    same for every kind of sum, so that all end in the same bytes. Fewer bits make smaller uploads.

    Raises:
        UserError: with `bits` as wished, a sum could exceed 32 bits.

    >>> fitting_bits(None, 3), fitting_bits(None, 1000), fitting_bits(20, 3)
    (23, 16, 20)
    """
    spread = (clients - 1).bit_length()
    most = _SUM_BITS - spread
    if bits is None:
        return min(most, max(_COARSEST_DEFAULT, _PAIRED_SUM_BITS - spread))
    if bits > most:
        raise UserError(
            f"[secure] bits must be at most {most} with {clients} clouds, got {bits}: a sum has "
            "to fit 32 bits"
        )
    return bits
