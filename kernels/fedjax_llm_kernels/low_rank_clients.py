"""Low-rank products that become one Pallas kernel where `jax.vmap` runs over clients.

A model is written for one client, with no word about the others. The batching rules here find the
clients again: they bring what belongs to each into the form of `many_adapters_pallas`, and the
results back. What they find something else in, they leave to XLA.

Letters: K clients; N positions, any number of leading dimensions, and T, the same in one; D inputs,
R rank, F outputs.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from . import low_rank_xla
from .low_rank_xla import Sides
from .pallas_forms import by_platform

type Cotangents = tuple[jax.Array, Sides, Sides, jax.Array]


@jax.custom_vjp
def products(x_NxD: jax.Array, a_DxR: Sides, b_RxF: Sides, scale: float | jax.Array) -> Sides:
    """As `low_rank_xla.products`, and a kernel under a `jax.vmap` over clients.

    For a client alone the R numbers of a position are not kept for the derivative but computed
    again; else nothing differs. A `jax.vmap` is taken to run over clients if it runs over the
    activations and, of every pair, over one side at least. A side that they share, as under rules
    that train the other one, is copied for each: R numbers for the T of each input.

    | case | form |
    |---|---|
    | `jax.vmap` over activations alone: examples, whose derivatives are wanted one by one | XLA |
    | `jax.vmap` over adapters whose activations are shared | XLA |
    | dtypes that differ, or are neither float32 nor bfloat16 | XLA |
    | no clients, positions, inputs, ranks or outputs | XLA |
    | a mesh with axes that the compiler divides by itself, which it cannot do with a kernel | XLA |
    | on a TPU, widths for which its fast memory is too small | XLA |

    Differentiable once, in reverse mode. A factor that is not finite may leave the products of the
    client's other pairs not finite too (see `_side_by_side`), and never those of another client.
    """
    return _forward(x_NxD, a_DxR, b_RxF, scale)[0]


def _forward(
    x_NxD: jax.Array, a_DxR: Sides, b_RxF: Sides, scale: float | jax.Array
) -> tuple[Sides, tuple[Any, ...]]:
    scale = jnp.asarray(scale)
    return _values(x_NxD, a_DxR, b_RxF, scale), (x_NxD, a_DxR, b_RxF, scale)


def _backward(saved: tuple[Any, ...], dy_NxF: Sides) -> Cotangents:
    x_NxD, a_DxR, b_RxF, scale = saved
    # A constant arrives as the number that it is.
    found: Cotangents = _cotangents(x_NxD, a_DxR, b_RxF, jnp.asarray(scale), dy_NxF)
    return found


products.defvjp(_forward, _backward)


def _values_of_one(x_NxD: jax.Array, a_DxR: Sides, b_RxF: Sides, scale: jax.Array) -> Sides:
    return low_rank_xla.forward(x_NxD, a_DxR, b_RxF, scale)[0]


def _cotangents_of_one(
    x_NxD: jax.Array, a_DxR: Sides, b_RxF: Sides, scale: jax.Array, dy_NxF: Sides
) -> Cotangents:
    return low_rank_xla.backward(low_rank_xla.forward(x_NxD, a_DxR, b_RxF, scale)[1], dy_NxF)


_values = jax.custom_batching.custom_vmap(_values_of_one)
_cotangents = jax.custom_batching.custom_vmap(_cotangents_of_one)


@_values.def_vmap
def _values_of_clients(clients: int, batched: list[Any], *arrays: Any) -> tuple[Any, Any]:
    from . import many_adapters_pallas

    tpu, gpu = many_adapters_pallas.tpu_forward, many_adapters_pallas.gpu_forward
    forms = (_values_of_one, partial(_values_by, tpu), partial(_values_by, gpu))
    return _batched(clients, batched, arrays, *forms, backward=False)


@_cotangents.def_vmap
def _cotangents_of_clients(clients: int, batched: list[Any], *arrays: Any) -> tuple[Any, Any]:
    from . import many_adapters_pallas

    tpu, gpu = many_adapters_pallas.tpu_backward, many_adapters_pallas.gpu_backward
    forms = (_cotangents_of_one, partial(_cotangents_by, tpu), partial(_cotangents_by, gpu))
    return _batched(clients, batched, arrays, *forms, backward=True)


def _batched(
    clients: int,
    batched: list[Any],
    arrays: tuple[Any, ...],
    one: Callable[..., Any],
    tpu: Callable[..., Any],
    gpu: Callable[..., Any],
    *,
    backward: bool,
) -> tuple[Any, Any]:
    """The results with a leading axis K, and that all have it."""
    if _kernel_can_have(batched, arrays):
        own = jax.tree.map(partial(_for_each, clients), tuple(batched), arrays)
        if not _tpu_holds(arrays[0], arrays[1], arrays[2], backward):
            # A GPU walks through widths of any size.
            tpu = partial(_by_xla, one)
        found = by_platform(tpu, gpu, *own)
    else:
        axes = jax.tree.map(lambda has: 0 if has else None, tuple(batched))
        found = jax.vmap(one, in_axes=axes, axis_size=clients)(*arrays)
    return found, jax.tree.map(lambda _: True, found)


def _kernel_can_have(batched: list[Any], arrays: tuple[Any, ...]) -> bool:
    """Whether a kernel can have these arrays."""
    (x_has, a_has, b_has, *_), (x, a, b, *_) = batched, arrays
    mesh = jax.sharding.get_abstract_mesh()
    return (
        x_has
        and all(of_a or of_b for of_a, of_b in zip(a_has, b_has, strict=True))
        and {array.dtype for array in (x, *a, *b)} in ({jnp.float32.dtype}, {jnp.bfloat16.dtype})
        and not any(0 in array.shape for array in (x, *a, *b))
        and all(n == 1 for axis, n in mesh.shape.items() if axis not in mesh.manual_axes)
    )


def _for_each(clients: int, has: bool, array: jax.Array) -> jax.Array:
    # A constant scale arrives as the number that it is, which has no shape of its own.
    return array if has else jnp.broadcast_to(array, (clients, *jnp.shape(array)))


def _tpu_holds(x: jax.Array, a: Sides, b: Sides, backward: bool) -> bool:
    from . import many_adapters_pallas

    rank, outputs = sum(one.shape[-1] for one in a), [one.shape[-1] for one in b]
    return many_adapters_pallas.tpu_holds(x.shape[-1], rank, outputs, x.dtype.itemsize, backward)


def _by_xla(one: Callable[..., Any], *arrays: Any, interpret: bool) -> Any:
    del interpret
    return jax.vmap(one)(*arrays)


def _values_by(
    kernel: Callable[..., Sides],
    x_KxNxD: jax.Array,
    a_KxDxR: Sides,
    b_KxRxF: Sides,
    scale_K: jax.Array,
    *,
    interpret: bool,
) -> Sides:
    y_KxTxF = kernel(_rows(x_KxNxD), *_side_by_side(a_KxDxR, b_KxRxF, scale_K), interpret=interpret)
    return tuple(y.reshape(*x_KxNxD.shape[:-1], y.shape[-1]) for y in y_KxTxF)


def _cotangents_by(
    kernel: Callable[..., tuple[jax.Array, jax.Array, Sides]],
    x_KxNxD: jax.Array,
    a_KxDxR: Sides,
    b_KxRxF: Sides,
    scale_K: jax.Array,
    dy_KxNxF: Sides,
    *,
    interpret: bool,
) -> Cotangents:
    sides = _side_by_side(a_KxDxR, b_KxRxF, scale_K)
    dx_KxTxD, da_KxDxR, wide_KxRxF = kernel(
        _rows(x_KxNxD), *sides, tuple(map(_rows, dy_KxNxF)), interpret=interpret
    )
    # Of scale times b, in float32.
    scaled_KxRxF = [
        db[:, start:end]
        for db, (start, end) in zip(wide_KxRxF, low_rank_xla.places(a_KxDxR), strict=True)
    ]
    by_K = scale_K.astype(x_KxNxD.dtype).astype(jnp.float32)
    dscale_K = sum(
        jnp.sum(b.astype(jnp.float32) * db, axis=(1, 2))
        for b, db in zip(b_KxRxF, scaled_KxRxF, strict=True)
    )
    return (
        dx_KxTxD.reshape(x_KxNxD.shape),
        tuple(da.astype(x_KxNxD.dtype) for da in low_rank_xla.split(da_KxDxR, a_KxDxR)),
        tuple((by_K[:, None, None] * db).astype(x_KxNxD.dtype) for db in scaled_KxRxF),
        jnp.asarray(dscale_K).astype(scale_K.dtype),
    )


def _rows(x_KxNxC: jax.Array) -> jax.Array:
    """[K, T, C]."""
    clients, *positions, columns = x_KxNxC.shape
    return x_KxNxC.reshape(clients, math.prod(positions), columns)


def _side_by_side(a_KxDxR: Sides, b_KxRxF: Sides, scale_K: jax.Array) -> tuple[jax.Array, Sides]:
    """One matrix a for all pairs; each b, scaled, with zeros where the ranks of others stand.

    So no kernel has to take columns apart, and a product with so few ranks costs no more: devices
    multiply 16 to 128 at a time.
    """
    places = low_rank_xla.places(a_KxDxR)
    rank = places[-1][1]
    wide_KxRxF = tuple(
        jnp.pad(b * scale_K.astype(b.dtype)[:, None, None], ((0, 0), (start, rank - end), (0, 0)))
        for b, (start, end) in zip(b_KxRxF, places, strict=True)
    )
    return jnp.concatenate(a_KxDxR, axis=-1), wide_KxRxF
