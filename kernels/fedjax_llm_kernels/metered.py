"""Low-rank products that measure, and bound, what each example adds to a factor's gradient.

The gradient of a factor is a sum of outer products over the positions of a batch. Reverse mode adds
them up over the examples too, so that what one example adds is never seen. A metered factor carries
a cap for each example; the cap's *cotangent* is the norm of what the example adds to the gradient
of the factor, and what it adds is shortened to the cap first. Nothing else of the model changes.

Letters: E examples, N positions of an example, D inputs, R rank, F outputs; P columns of x, Q of u.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedjax_llm_kernels.clip_norm import MARGIN, clip_arrays, scaled

# The least norm that the Gram way reports of what is not zero: scales whose product is denormal,
# and so zero, belong to norms far below it.
_LEAST = 2.0**-80


class NotAPlainFactor(TypeError):
    """A metered factor was used for something else than a low-rank product."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metered:
    """A factor in the place of its array, in one example's view of a model.

    A pytree node, so that a scan over layers hands on a layer's value and cap. It is no array:
    whatever would compute with it, other than `low_rank_matmul`, is refused while tracing. A
    function of pytrees (`jax.tree.map`) must not change it: cap and value would both change.

    Attributes:
        value: [..., D, R] or [..., R, F] float32, the same for all examples.
        cap: [...] float32, a norm for each leading entry; differs by example under `jax.vmap`.
            Read as a bound, inf for none; its cotangent is the norm before shortening.
    """

    value: jax.Array
    cap: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        """Of the value."""
        return self.value.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Of the value."""
        return self.value.dtype

    def astype(self, dtype: jax.typing.DTypeLike) -> "Metered":
        """Unchanged: the product casts, so that gradients are clipped and summed in float32."""
        del dtype
        return self

    def __jax_array__(self) -> jax.Array:
        raise NotAPlainFactor(
            "a metered factor can only be multiplied with, by low_rank_matmul, and here something "
            "else is computed from it"
        )


def metered_matmul(
    x: jax.Array, a: jax.Array | Metered, b: jax.Array | Metered, scale: float | jax.Array
) -> jax.Array:
    """`low_rank_matmul` of one example where at least one factor is metered.

    It must run under `jax.vmap` over the examples with caps that differ by example, and be
    differentiated outside of it, so that the examples' outer products are in one place. Axes that
    other `vmap`s inside the loss add are positions of the same example.

    Formal guarantee: for each call and each metered factor, what example e adds to the cotangent of
    the value has norm at most its cap (see `clipped_outer_sum`), and e adds to the cotangent of the
    cap the norm before shortening, understated by less than a relative 2^-15. Over several calls
    with one factor the latter add up to a bound of the whole by the triangle inequality; the caps
    hold for each call.

    Args:
        x: [..., D] of one example.
        a: [D, R].
        b: [R, F].
        scale: multiplies the product.

    Raises:
        TypeError: a factor differs by example.
    """
    a, cap_a = (a.value, a.cap) if isinstance(a, Metered) else (a, jnp.float32(jnp.inf))
    b, cap_b = (b.value, b.cap) if isinstance(b, Metered) else (b, jnp.float32(jnp.inf))
    found: jax.Array = _of_one_example(x, cap_a, cap_b, a, b, jnp.asarray(scale))
    return found


@jax.custom_batching.custom_vmap
def _of_one_example(
    x: jax.Array,
    cap_a: jax.Array,
    cap_b: jax.Array,
    a_DxR: jax.Array,
    b_RxF: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    x_1xNxD = x.reshape(1, -1, x.shape[-1])
    y_1xNxF = _product(x_1xNxD, cap_a[None], cap_b[None], a_DxR, b_RxF, scale)
    return y_1xNxF.reshape(*x.shape[:-1], -1)


@_of_one_example.def_vmap
def _of_examples(
    examples: int,
    batched: list[bool],
    x: jax.Array,
    cap_a: jax.Array,
    cap_b: jax.Array,
    a_DxR: jax.Array,
    b_RxF: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, bool]:
    if any(batched[3:]):
        raise TypeError("a metered factor, its partner and scale must be the same for all examples")
    if not batched[1] and not batched[2]:
        return _of_one_example(x, cap_a, cap_b, a_DxR, b_RxF, scale), True
    x, cap_a, cap_b = (
        array if has else jnp.broadcast_to(array, (examples, *array.shape))
        for array, has in zip((x, cap_a, cap_b), batched[:3], strict=True)
    )
    x_ExNxD = x.reshape(examples, -1, x.shape[-1])
    y_ExNxF = _product(x_ExNxD, cap_a, cap_b, a_DxR, b_RxF, scale)
    return y_ExNxF.reshape(*x.shape[:-1], -1), True


@jax.custom_vjp
def _product(
    x_ExNxD: jax.Array,
    cap_a_E: jax.Array,
    cap_b_E: jax.Array,
    a_DxR: jax.Array,
    b_RxF: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    return _forward(x_ExNxD, cap_a_E, cap_b_E, a_DxR, b_RxF, scale)[0]


def _forward(
    x_ExNxD: jax.Array,
    cap_a_E: jax.Array,
    cap_b_E: jax.Array,
    a_DxR: jax.Array,
    b_RxF: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    dtype = x_ExNxD.dtype
    inner_ExNxR = (x_ExNxD @ a_DxR.astype(dtype)) * scale.astype(dtype)
    y_ExNxF = inner_ExNxR @ b_RxF.astype(dtype)
    return y_ExNxF, (x_ExNxD, inner_ExNxR, cap_a_E, cap_b_E, a_DxR, b_RxF, scale)


def _backward(saved: tuple[jax.Array, ...], dy_ExNxF: jax.Array) -> tuple[jax.Array | None, ...]:
    x_ExNxD, inner_ExNxR, cap_a_E, cap_b_E, a_DxR, b_RxF, scale = saved
    dtype = x_ExNxD.dtype
    u_ExNxR = (dy_ExNxF @ b_RxF.astype(dtype).T) * jnp.asarray(scale, dtype)
    da_DxR, norm_a_E = clipped_outer_sum(x_ExNxD, u_ExNxR, cap_a_E)
    db_RxF, norm_b_E = clipped_outer_sum(inner_ExNxR, dy_ExNxF, cap_b_E)
    dx_ExNxD = u_ExNxR @ a_DxR.astype(dtype).T
    da_DxR, db_RxF = da_DxR.astype(a_DxR.dtype), db_RxF.astype(b_RxF.dtype)
    # The scale is a constant of the adapter: the norms would not cover its derivative.
    return dx_ExNxD, norm_a_E, norm_b_E, da_DxR, db_RxF, None


_product.defvjp(_forward, _backward)


def clipped_outer_sum(
    x_ExNxP: jax.Array, u_ExNxQ: jax.Array, cap_E: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sum over examples of x_e' u_e, each shortened to its cap, and the norms before shortening.

    Two ways, of which the one with fewer multiplications is taken by the shapes:

    - direct, N (P + Q) >= P Q, E N P Q multiplications: the E products x_e' u_e are formed, clipped
      as `clip_arrays` does, and added. They are those of one factor in one layer.
    - Gram, for fewer positions than the rank, roughly: ||x_e' u_e||^2 = <x_e x_e', u_e u_e'>, N x N
      each (arXiv 1510.01799), then one product over examples and positions at once. Nothing of the
      size E P Q is formed.

    Formal guarantee: what example e contributes has norm at most cap_e, and follows from nothing
    but x_e, u_e and cap_e. Direct: as the float32 values that are added. Gram: in exact arithmetic
    for the values of x and of the rescaled u; with n = P + Q + N^2, the root of the Gram product is
    taken with n 2^-23 ||x_e||^2 ||u_e||^2 more under it, which exceeds its worst-case rounding
    error. The one product then rounds as matrix products do, relative to sums of magnitudes: by at
    most about E N 2^-24 / sqrt(n 2^-23) caps, some hundred times less in practice.

    | input of an example             | contribution | norm reported |
    |---------------------------------|--------------|---------------|
    | NaN or inf in the product       | zeros        | inf           |
    | NaN or inf in x or u (Gram)     | zeros        | inf           |
    | all magnitudes denormal         | zeros        | 0             |
    | norm above 3.4e38, cap finite   | scaled to the cap (direct), zeros (Gram) | inf |
    | cap inf                         | unchanged    | the norm      |
    | cap zero, negative or NaN       | zeros        | the norm      |

    Args:
        x_ExNxP: float32 or bfloat16.
        u_ExNxQ: of the same dtype.
        cap_E: float32.

    Returns:
        [P, Q] float32 and [E] float32.
    """
    _, positions, width_p = x_ExNxP.shape
    width_q = u_ExNxQ.shape[2]
    if positions * (width_p + width_q) >= width_p * width_q:
        each_ExPxQ = jnp.einsum(
            "enp,enq->epq", x_ExNxP, u_ExNxQ, preferred_element_type=jnp.float32
        )

        def one(each_PxQ: jax.Array, cap: jax.Array) -> tuple[jax.Array, jax.Array]:
            (short_PxQ,), norm = clip_arrays([each_PxQ], cap)
            return short_PxQ, norm

        short_ExPxQ, norm_E = jax.vmap(one)(each_ExPxQ, cap_E)
        return short_ExPxQ.sum(axis=0), norm_E

    x_ExNxP, u_ExNxQ = x_ExNxP.astype(jnp.float32), u_ExNxQ.astype(jnp.float32)
    x_ExNxP, u_ExNxQ, norm_E = jax.vmap(_gram_norm)(x_ExNxP, u_ExNxQ)
    cap_E = jnp.where(cap_E > 0, cap_E, jnp.float32(0))
    reach_E = norm_E * jnp.float32(MARGIN)
    keep_E = (reach_E <= cap_E) | jnp.isinf(cap_E)
    scale_E = jnp.where(keep_E, jnp.float32(1), cap_E / jnp.maximum(reach_E, jnp.float32(_LEAST)))
    total_PxQ = jnp.einsum(
        "enp,enq->pq",
        x_ExNxP,
        u_ExNxQ * scale_E[:, None, None],
        precision=jax.lax.Precision.HIGHEST,
    )
    return total_PxQ, norm_E


def _gram_norm(x_NxP: jax.Array, u_NxQ: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both factors, zeros where the product is to count for nothing, and a bound of its norm."""
    (shrink_x, grow_x, normal_x, finite_x) = scaled([x_NxP])
    (shrink_u, grow_u, normal_u, finite_u) = scaled([u_NxQ])

    def gram(of: jax.Array) -> jax.Array:
        return jnp.einsum("np,mp->nm", of, of, precision=jax.lax.Precision.HIGHEST)

    gram_x_NxN, gram_u_NxN = gram(x_NxP * shrink_x), gram(u_NxQ * shrink_u)
    square = jnp.maximum(jnp.sum(gram_x_NxN * gram_u_NxN), jnp.float32(0))
    terms = x_NxP.shape[1] + u_NxQ.shape[1] + x_NxP.shape[0] ** 2 + 8
    rounding = jnp.float32(terms * 2.0**-23) * (jnp.trace(gram_x_NxN) * jnp.trace(gram_u_NxN))
    norm = jnp.maximum(jnp.sqrt(square + rounding) * (grow_x * grow_u), jnp.float32(_LEAST))
    finite, normal = finite_x & finite_u, normal_x & normal_u
    counts = normal & (norm < jnp.inf)
    norm = jnp.where(normal, norm, jnp.where(finite, jnp.float32(0), jnp.inf))
    zero = jnp.float32(0)
    return jnp.where(counts, x_NxP, zero), jnp.where(counts, u_NxQ, zero), norm
