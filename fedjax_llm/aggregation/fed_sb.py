"""Fed-SB: only an R x R matrix between two fixed projections is trained and sent."""

import jax.numpy as jnp

from fedjax_llm.aggregation.part import Part, put
from fedjax_llm.aggregation.rule import AggregationRule, Facts, PyTree, Round, ServerState
from fedjax_llm.lora import Adapter, LowRank, algebra

_TRAINS_A, _TRAINS_R = 1, 2


class FedSb(AggregationRule):
    """Fed-SB's rule (arXiv 2502.15436) with a start that adds up and can be private.

    The update is A R B with A and B orthonormal and fixed, so that it is linear in R, and R^2
    numbers are sent whatever the model's width.

    Everything rests on A and B. The paper takes them from the singular vectors of a full gradient,
    gathered from private examples without noise, D F numbers a matrix. Here the first two rounds
    find them as one step of a subspace iteration does, with messages that are averaged, noised and
    encrypted like all others: the first trains B against the random A, which spans the gradient's
    leading row space; the second trains A against that B. Then both are made orthonormal,
    R starts as what keeps the product, and only R moves.
    """

    name = "fed-sb"
    source = "arXiv 2502.15436"
    summary = "after two rounds that find A and B, only an R x R matrix is trained"
    facts = Facts(
        exact=True,
        dp_safe=True,
        ranks=True,
        uplink="R^2 (R F and R D in the first two rounds)",
        downlink="R^2 (R F and R D in the first two rounds)",
    )
    phases = (("b",), ("a",), ("r",))

    def init(self, adapter: Adapter) -> ServerState:
        """As all rules, with room for R and B's basis."""
        memory = {
            name: {
                "r": jnp.zeros((b_LxRxF.shape[0], b_LxRxF.shape[1], b_LxRxF.shape[1])),
                "basis": jnp.zeros_like(b_LxRxF),
            }
            for name, (_, b_LxRxF) in adapter.factors.items()
        }
        return self._with_optimizer(ServerState(adapter, (), {}, memory))

    def phase(self, round_number: int) -> int:
        """B, then A, then R for good."""
        return min(round_number - 1, _TRAINS_R)

    def trainable(self, server: ServerState, phase: int = 0) -> Part:
        """The side of the phase; R comes from the memory."""
        if phase == _TRAINS_R:
            return {name: {"r": kept["r"]} for name, kept in server.memory.items()}
        return super().trainable(server, phase)

    def adapter(self, server: ServerState, part: Part) -> Adapter:
        """A and R B stand for A R B."""
        if not all("r" in sides for sides in part.values()):
            return put(server.adapter, part)
        factors = {
            name: factor._replace(
                b_LxRxF=algebra.matmul(part[name]["r"], server.memory[name]["basis"])
            )
            for name, factor in server.adapter.factors.items()
        }
        return Adapter(factors=factors, scale=server.adapter.scale)

    def apply(self, round_: Round, mean: PyTree, shared: PyTree = ()) -> ServerState:
        """The server's step; after A's round, the change to A R B."""
        del shared
        part, server = self._step(round_, mean)
        after = server._replace(adapter=self.adapter(server, part))
        if round_.phase == _TRAINS_R:
            memory = {name: kept | part[name] for name, kept in server.memory.items()}
            return after._replace(memory=memory)
        if round_.phase != _TRAINS_A:
            return after
        factors, memory = {}, {}
        for name, (a_LxDxR, b_LxRxF) in after.adapter.factors.items():
            q_LxDxR = algebra.orthonormal(a_LxDxR)
            basis_LxRxF = algebra.transposed(algebra.orthonormal(algebra.transposed(b_LxRxF)))
            r_LxRxR = algebra.matmul(
                algebra.matmul_tn(q_LxDxR, a_LxDxR),
                algebra.matmul_nt(b_LxRxF, basis_LxRxF),
            )
            factors[name] = LowRank(q_LxDxR, algebra.matmul(r_LxRxR, basis_LxRxF))
            memory[name] = {"r": r_LxRxR, "basis": basis_LxRxF}
        adapter = Adapter(factors=factors, scale=after.adapter.scale)
        return after._replace(adapter=adapter, memory=memory)
