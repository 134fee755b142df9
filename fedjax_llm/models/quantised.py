"""Frozen kernels in few bits: what one is, the eight-bit one, and the product with activations.

A quantised kernel is a small pytree in the place of a float array of the base. Its leaves keep the
leading axis of layers, so that the scan over layers hands one layer at a time to the decoder, and
only that layer exists in floats, for as long as its product takes.

Qwix is not used: it replaces `jax.lax` functions while tracing, its NF4 refuses rows that are no
multiple of 64 (the 288 of stories15M) and keeps scales in float32.

Letters: D inputs, F outputs, N rows of activations; "..." is the axis of layers, or nothing.
"""

import abc
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

# Codes run to +-127 and stand for code / 127 of a channel's largest weight. 127 times this is
# exactly one in float32: a channel's largest weight is kept to the bit.
_STEP = 1 / 127


class Quantised(abc.ABC):
    """A frozen kernel that is not kept as floats."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that it stands for, [..., D, F]."""

    @abc.abstractmethod
    def dequantised(self) -> jax.Array:
        """The kernel that it stands for, float32 [..., D, F]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Quantised):
    """Symmetric, one scale for each output channel: 8 bits a weight and 32 a channel.

    Error of a weight: at most 1/254 of the largest weight of its channel, and rounding. A kernel
    that came from here goes through unchanged.

    Attributes:
      codes_DxF: int8 [..., D, F] in [-127, 127].
      largest_1xF: float32 [..., 1, F], the largest magnitude of each channel.
    """

    codes_DxF: jax.Array
    largest_1xF: jax.Array

    @classmethod
    def of(cls, kernel_DxF: jax.Array) -> Self:
        """Rounds a finite kernel [..., D, F] to the nearest codes."""
        kernel_DxF = jnp.asarray(kernel_DxF, jnp.float32)
        largest_1xF = largest(kernel_DxF, axis=-2)
        codes_DxF = jnp.round(kernel_DxF / nonzero(largest_1xF) * 127.0).astype(jnp.int8)
        return cls(codes_DxF, largest_1xF)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes_DxF.shape

    def dequantised(self) -> jax.Array:
        return self.codes_DxF.astype(jnp.float32) * jnp.float32(_STEP) * self.largest_1xF


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Added(Quantised):
    """A quantised kernel and what a rule has folded into it, kept apart: nothing is rounded again.

    Attributes:
      frozen: the kernel.
      added_DxF: float32 [..., D, F].
    """

    frozen: Quantised
    added_DxF: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.frozen.shape

    def dequantised(self) -> jax.Array:
        return self.frozen.dequantised() + self.added_DxF


def any_quantised(tree: Any) -> bool:
    """Whether a pytree holds a quantised kernel."""
    return any(map(_is_quantised, jax.tree.leaves(tree, is_leaf=_is_quantised)))


def _is_quantised(leaf: Any) -> bool:
    return isinstance(leaf, Quantised)


def largest(values: jax.Array, axis: int) -> jax.Array:
    """Largest magnitude along an axis, which stays; 0 where it is subnormal.

    Processors flush such numbers to zero, or do not; here they are zeros everywhere.
    """
    found = jnp.max(jnp.abs(values), axis=axis, keepdims=True)
    return jnp.where(found < jnp.finfo(jnp.float32).tiny, jnp.float32(0), found)


def nonzero(values: jax.Array) -> jax.Array:
    """The values, and 1 for zeros: what is divided by them is zero as well."""
    return jnp.where(values == 0, jnp.float32(1), values)


def frozen_matmul(x_NxD: jax.Array, kernel_DxF: jax.Array | Quantised) -> jax.Array:
    """Computes ``x @ kernel`` in the dtype of ``x``, for a kernel of any kind.

    A kernel that has to be made first, dequantised or cast, is made once forward and once
    backward: the derivative would otherwise keep it, for every layer, which is the whole model in
    floats. That product has no derivative with respect to the kernel; asking for one is a
    `TypeError` while tracing, never zero.

    Args:
      x_NxD: activations; any number of leading dimensions.
      kernel_DxF: [D, F]. An array of the dtype of ``x`` is differentiable.

    Returns:
      [N, F], of the dtype of ``x``.
    """
    if not isinstance(kernel_DxF, Quantised) and kernel_DxF.dtype == x_NxD.dtype:
        return x_NxD @ kernel_DxF
    return _made_matmul(x_NxD, kernel_DxF)


@jax.custom_vjp
def _made_matmul(x_NxD: jax.Array, kernel: jax.Array | Quantised) -> jax.Array:
    return x_NxD @ _made(kernel, x_NxD.dtype)


def _made(kernel: jax.Array | Quantised, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The kernel in floats.

    The barrier keeps it apart from the product, which is then compiled as for a float model and
    gives the same bytes.
    """
    floats = kernel.dequantised() if isinstance(kernel, Quantised) else kernel
    return jax.lax.optimization_barrier(floats.astype(dtype))


def _forward(x_NxD: Any, kernel: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    # With symbolic_zeros every leaf arrives with a flag: is a derivative asked for?
    leaves, tree = jax.tree.flatten(kernel, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    if any(leaf.perturbed for leaf in leaves):
        raise TypeError(
            "frozen_matmul has no derivative with respect to a kernel that it dequantises or "
            "casts; keep the base in float32 to differentiate by it"
        )
    kernel = jax.tree.unflatten(tree, [leaf.value for leaf in leaves])
    return _made_matmul(x_NxD.value, kernel), kernel


def _backward(kernel: Any, dy_NxF: Any) -> tuple[jax.Array, None]:
    weights_DxF = _made(kernel, dy_NxF.dtype)
    contracted = (((dy_NxF.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(dy_NxF, weights_DxF, contracted), None


_made_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
