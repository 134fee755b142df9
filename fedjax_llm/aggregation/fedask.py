"""FedASK: two sums of sketches give the best low-rank form of the mean product."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fedjax_llm.aggregation.part import Side, pick, size_at_rank
from fedjax_llm.aggregation.rule import (
    AggregationRule,
    Facts,
    LocalResult,
    PyTree,
    Round,
    ServerState,
)
from fedjax_llm.lora import Adapter, LowRank, algebra

Sketches = dict[str, jax.Array]


class FedAsk(AggregationRule):
    """FedASK's rule (arXiv 2507.09990): both factors move, and still all that is sent adds up.

    Let M be the global product and C_k the change of client k's product. First the clients send
    C_k Omega for a random Omega of F x S that all know; M Omega plus their mean spans the range of
    the new product, and the server answers with an orthonormal basis Q. Then the clients send
    Q' C_k, and Q times the singular value decomposition of Q' M plus the mean, cut at rank R, is
    the new product, its singular values shared between A and B. Nobody forms a D x F matrix.

    Omega has S = 2 R columns, at most D and F: the R rows of the global B, and as many random ones
    that each round draws anew. The first make the sketch one more step of a subspace iteration that
    goes on from round to round, as PowerSGD does (arXiv 1905.13727), far more accurate than the
    paper's purely random Omega; the others find what is new. What is cut is what the mean has
    beyond rank R; there lies the difference to the mean product.
    """

    name = "fedask"
    source = "arXiv 2507.09990"
    summary = "two sums of sketches give the best rank-R form of the mean product"
    facts = Facts(
        exact=False,
        dp_safe=False,
        ranks=True,
        uplink="2 R (D + F)",
        downlink="3 R D + R F",
    )
    phases: ClassVar[tuple[tuple[Side, ...], ...]] = (("a", "b"),)
    stages = 2
    plain_steps_only = True
    new_coordinates = True

    def message(self, round_: Round, result: LocalResult, stage: int, shared: PyTree) -> Sketches:
        """The change of the client's product times Omega; then Q' times the change."""
        before = self.adapter(round_.server, result.before)
        after = self.adapter(round_.server, result.after)
        sketches = {}
        for index, (name, new) in enumerate(after.factors.items()):
            old = before.factors[name]
            if stage == 0:
                omega_LxFxS = self._omega(round_, index, new)
                sketches[name] = _times(new, omega_LxFxS) - _times(old, omega_LxFxS)
            else:
                q_LxDxS = shared[name]
                sketches[name] = _project(q_LxDxS, new) - _project(q_LxDxS, old)
        return sketches

    def between(self, round_: Round, stage: int, mean: Sketches) -> Sketches:
        """The basis Q by projection."""
        del stage
        bases = {}
        for index, (name, factor) in enumerate(round_.server.adapter.factors.items()):
            sketch_LxDxS = _times(factor, self._omega(round_, index, factor)) + mean[name]
            bases[name] = algebra.orthonormal(sketch_LxDxS)
        return bases

    def apply(self, round_: Round, mean: Sketches, shared: PyTree = ()) -> ServerState:
        """The best product of rank R inside the basis."""
        rate, server = self._rate(round_)
        factors = {}
        for name, factor in server.adapter.factors.items():
            q_LxDxS = shared[name]
            inside_LxSxF = _project(q_LxDxS, factor) + rate * mean[name]
            p_LxFxS, right_LxSxS = jnp.linalg.qr(algebra.transposed(inside_LxSxF))
            u, s, vt = jnp.linalg.svd(algebra.transposed(right_LxSxS), full_matrices=False)
            rank = factor.a_LxDxR.shape[-1]
            # Half of each singular value to either side, so that both learn at one rate.
            root = jnp.sqrt(s[..., :rank])
            factors[name] = LowRank(
                algebra.matmul(q_LxDxS, u[..., :rank] * root[..., None, :]),
                algebra.matmul(root[..., :, None] * vt[..., :rank, :], algebra.transposed(p_LxFxS)),
            )
        return server._replace(adapter=Adapter(factors=factors, scale=server.adapter.scale))

    def uplink(self, server: ServerState, phase: int, rank: int) -> int:
        """Two sketches, whatever the client's rank."""
        del phase, rank
        total = 0
        for factor in server.adapter.factors.values():
            layers, inputs, _ = factor.a_LxDxR.shape
            total += layers * _width(factor) * (inputs + factor.b_LxRxF.shape[-1])
        return total

    def downlink(self, server: ServerState, phase: int, ranks: tuple[int, ...], rank: int) -> int:
        """Both factors; the basis between the stages is counted apart, by its own size."""
        del phase, ranks, rank
        return size_at_rank(pick(server.adapter, ("a", "b")))

    def _omega(self, round_: Round, index: int, factor: LowRank) -> jax.Array:
        """The rows of the global B, then random signs, which also stand in for rows of zeros.

        Clients and server compute it in programs of their own and need the same bytes: so there is
        no rounding in it, which a compiler may do in one way or another (normal draws end in a
        polynomial). Signs span as well, and the lengths of the columns do not matter.
        """
        layers, rank, outputs = factor.b_LxRxF.shape
        key = jax.random.fold_in(round_.key, index)
        random_LxFxS = jax.random.rademacher(key, (layers, outputs, _width(factor)), jnp.float32)
        known_LxFxR = algebra.transposed(factor.b_LxRxF)
        found_Lx1xR = jnp.any(known_LxFxR != 0, axis=1, keepdims=True)
        known_LxFxR = jnp.where(found_Lx1xR, known_LxFxR, random_LxFxS[..., :rank])
        return jnp.concatenate([known_LxFxR, random_LxFxS[..., rank:]], axis=-1)


class FedAskFixedA(FedAsk):
    """FedASK's private form (arXiv 2507.09990): clients train, clip and noise B alone.

    A stays as it was broadcast. So the mean product has rank R, nothing is cut, and noise enters
    once: the rule is exact, and differs from `fedsvd` in where the singular values go (and in
    sending more than it needs to).
    """

    name = "fedask-fixed-a"
    summary = "FedASK as the paper runs it under privacy: clients train B alone"
    facts = Facts(
        exact=True,
        dp_safe=True,
        ranks=True,
        uplink="2 R (D + F)",
        downlink="3 R D + R F",
    )
    phases = (("b",),)


def _width(factor: Any) -> int:
    """S."""
    _, inputs, rank = factor.a_LxDxR.shape
    return min(2 * rank, inputs, factor.b_LxRxF.shape[-1])


def _times(factor: LowRank, omega_LxFxS: jax.Array) -> jax.Array:
    return algebra.matmul(factor.a_LxDxR, algebra.matmul(factor.b_LxRxF, omega_LxFxS))


def _project(q_LxDxS: jax.Array, factor: LowRank) -> jax.Array:
    inner_LxSxR = algebra.matmul(algebra.transposed(q_LxDxS), factor.a_LxDxR)
    return algebra.matmul(inner_LxSxR, factor.b_LxRxF)
