"""FedRot-LoRA: each client turns its factors towards the global ones before they are averaged."""

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.part import Part
from fedjax_llm.aggregation.rule import AggregationRule, Facts, LocalResult, PyTree, Round
from fedjax_llm.lora import algebra

# The paper's ablation finds 0.4 to 0.6 best; 1 is the full rotation.
SOFTNESS = 0.5


class FedRotLora(AggregationRule):
    """FedRot-LoRA's rule (arXiv 2602.23638).

    A B = (A Q)(Q' B) for every rotation Q, so that clients with equal products can hold unequal
    factors, whose means then cancel. Before it sends, each client takes the rotation that brings
    its A (in even rounds) or its B (in odd rounds from the third) closest to the last global one,
    an orthogonal Procrustes problem of R x R, goes half of the way, and applies it to both factors.
    The product of the client is unchanged, the mean of the factors closer to the mean product.
    """

    name = "fedrot"
    source = "arXiv 2602.23638"
    summary = "clients rotate A and B towards the global ones, then they are averaged"
    facts = Facts(exact=False, dp_safe=False, ranks=False, uplink="R (D + F)", downlink="R (D + F)")
    phases = (("a", "b"),)

    def message(self, round_: Round, result: LocalResult, stage: int, shared: PyTree) -> Part:
        """The change to the rotated factors."""
        del stage, shared
        message = {}
        for name, after in result.after.items():
            before = result.before[name]
            # R x R correlations of the client's ranks with the global ones.
            by_a = algebra.matmul_tn(after["a"], before["a"])
            by_b = algebra.matmul_nt(after["b"], before["b"])
            by = jnp.where(round_.number % 2 == 0, by_a, by_b)
            turn = _rotation(by, SOFTNESS)
            # Before the second round B is zero and there is nothing to align with.
            identity = jnp.broadcast_to(jnp.eye(turn.shape[-1], dtype=turn.dtype), turn.shape)
            turn = jnp.where(round_.number == 1, identity, turn)
            message[name] = {
                "a": algebra.matmul(after["a"], turn) - before["a"],
                "b": algebra.matmul_tn(turn, after["b"]) - before["b"],
            }
        return message


def _rotation(correlation_LxRxR: jax.Array, softness: float) -> jax.Array:
    """The rotation nearest to (1 - softness) I + softness Q, with Q the Procrustes solution."""
    turn = _nearest(correlation_LxRxR)
    identity = jnp.broadcast_to(jnp.eye(turn.shape[-1], dtype=turn.dtype), turn.shape)
    return _nearest(jnp.float32(1 - softness) * identity + jnp.float32(softness) * turn)


def _nearest(x_LxRxR: jax.Array) -> jax.Array:
    """The proper rotation U diag(1, .., 1, det) V' that maximises the trace of Q' x."""
    u, _, vt = jnp.linalg.svd(x_LxRxR, full_matrices=False)
    sign = jnp.sign(jnp.linalg.det(algebra.matmul(u, vt)))
    # det of an orthogonal matrix is 1 or -1; a damaged one must not become zero.
    sign = jnp.where(sign < 0, jnp.float32(-1), jnp.float32(1))
    u = jnp.concatenate([u[..., :-1], u[..., -1:] * sign[..., None, None]], axis=-1)
    return algebra.matmul(u, vt)
