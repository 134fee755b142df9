"""FedSVD: B is trained, and each round the server turns the product to its principal axes."""

import jax.numpy as jnp

from fedjax_llm.aggregation.part import Part, pick, size_at_rank
from fedjax_llm.aggregation.rule import AggregationRule, Facts, PyTree, Round, ServerState
from fedjax_llm.lora import Adapter, LowRank, algebra


class FedSvd(AggregationRule):
    """FedSVD's rule (arXiv 2505.12805).

    As FFA-LoRA, but after each round A becomes the leading singular vectors of the product and B
    the singular values times the others: A adapts without being sent or noised, which under
    differential privacy is post-processing, and its orthonormal columns bound the gradient of B.
    The product has rank R already, so that only R x R matrices are decomposed and nothing is lost.

    The first A is made orthonormal here; the paper starts from PEFT's uniform one.
    """

    name = "fedsvd"
    source = "arXiv 2505.12805"
    summary = "B is averaged, then A and B turn to the product's singular vectors"
    facts = Facts(exact=True, dp_safe=True, ranks=True, uplink="R F", downlink="R (D + F)")
    phases = (("b",),)
    plain_steps_only = True
    new_coordinates = True

    def prepared(self, adapter: Adapter) -> Adapter:
        """The adapter with orthonormal A and the same product."""
        factors = {}
        for name, (a_LxDxR, b_LxRxF) in adapter.factors.items():
            q_LxDxR, rest_LxRxR = jnp.linalg.qr(a_LxDxR)
            factors[name] = LowRank(q_LxDxR, algebra.matmul(rest_LxRxR, b_LxRxF))
        return Adapter(factors=factors, scale=adapter.scale)

    def apply(self, round_: Round, mean: Part, shared: PyTree = ()) -> ServerState:
        """Adds the mean to B, then rewrites the product as its singular value decomposition."""
        del shared
        rate, server = self._rate(round_)
        factors = {}
        for name, (a_LxDxR, b_LxRxF) in server.adapter.factors.items():
            stepped_LxRxF = b_LxRxF + rate * mean[name]["b"]
            factors[name] = LowRank(*algebra.principal_axes(a_LxDxR, stepped_LxRxF))
        return server._replace(adapter=Adapter(factors=factors, scale=server.adapter.scale))

    def downlink(self, server: ServerState, phase: int, ranks: tuple[int, ...], rank: int) -> int:
        """Both factors: A has changed too."""
        del phase, ranks, rank
        return size_at_rank(pick(server.adapter, ("a", "b")))
