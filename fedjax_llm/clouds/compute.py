"""How fast a cloud trains: measured, or derived from its accelerators' arithmetic.

Derived time is FLOPs over sustained FLOP/s: accelerators x peak x utilisation. It knows nothing of
memory bandwidth, of small batches or of the input pipeline: all of that is in the utilisation.
"""

import dataclasses
import math
from dataclasses import dataclass

from fedjax_llm.errors import UserError

# Published utilisation of large training runs: 21 % (GPT-3) to 46 % (PaLM), arXiv 2204.02311
# Table 3. Small models with adapters fill a device less than those; 30 % is no promise.
UTILIZATION = 0.3


def training_flops(
    parameters: float,
    *,
    adapter: float = 0.0,
    layers: int = 0,
    width: int = 0,
    length: int = 0,
    remat: bool = False,
) -> float:
    """Floating-point operations for training on one token, additions and multiplications apart.

    | part | forward | backward | source |
    |---|---|---|---|
    | matrices, trained | 2 N | 4 N | arXiv 2001.08361, section 2.1 |
    | matrices, frozen | 2 N | 2 N: gradients of activations, none of weights | the same count |
    | adapter | 2 A | 4 A | the same count |
    | causal attention | 2 L T D | 4 L T D: both factors of both products | 2001.08361, table 1 |
    | rematerialisation | | all of forward once more | |

    Args:
        parameters: N that every token is multiplied by: all matrices and the output head, and not
            the input embedding, which is looked up.
        adapter: A, parameters of the adapter, which alone is trained; 0: all N are trained.
        layers: L; with 0 attention is left out.
        width: D of all heads of a layer together.
        length: T, tokens of a sequence. A token sees T / 2 others on average.
        remat: whether activations are computed again in the backward pass.

    >>> training_flops(7e9, adapter=0.0) == 6 * 7e9, training_flops(7e9, adapter=1.0) // 7e9
    (True, 4.0)
    """
    attention = 2.0 * layers * length * width
    forward = 2.0 * parameters + 2.0 * adapter + attention
    weights = 4.0 * adapter + (2.0 if adapter else 4.0) * parameters
    return forward + weights + 2.0 * attention + (forward if remat else 0.0)


@dataclass(frozen=True)
class Compute:
    """The machines of a cloud, by measurement or by datasheet.

    Attributes:
        tokens_per_second: measured, of the whole cloud while it trains. Excludes the four below.
        peak_flops: of one accelerator in the precision of the run, FLOP/s without sparsity.
        utilization: sustained over peak FLOP/s, counting recomputed operations as work; in (0, 1].
        flops_per_token: see `training_flops`; None until the model is known.
        accelerators: how many train together; their speeds add up.
        memory_gib: of one accelerator, GiB (2^30 bytes); None if it does not matter.

    Raises:
        UserError: both ways or neither, or a value outside its range.
    """

    tokens_per_second: float | None = None
    peak_flops: float | None = None
    utilization: float | None = None
    flops_per_token: float | None = None
    accelerators: int = 1
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        derived = [self.peak_flops, self.utilization, self.flops_per_token]
        if self.tokens_per_second is not None and derived != [None] * 3:
            raise UserError(
                f"tokens_per_second = {self.tokens_per_second:g} is measured and excludes peak "
                "FLOP/s, utilization and FLOPs per token; keep one of the two ways"
            )
        if self.tokens_per_second is None and self.peak_flops is None:
            raise UserError(
                "compute needs tokens_per_second as measured, or the peak FLOP/s of an accelerator"
            )
        for name in ("tokens_per_second", "peak_flops", "flops_per_token", "memory_gib"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be positive and finite, got {value:g}")
        if self.utilization is not None and not 0 < self.utilization <= 1:
            raise UserError(
                f"utilization must be above 0 and at most 1, got {self.utilization:g}; it is the "
                "share of the peak that a run sustains, often 0.2 to 0.5"
            )
        if self.accelerators < 1:
            raise UserError(f"accelerators must be at least 1, got {self.accelerators}")

    def for_model(self, flops_per_token: float) -> "Compute":
        """The same machines with the cost of a model; a measured speed stays as it is."""
        if self.tokens_per_second is not None:
            return self
        return dataclasses.replace(self, flops_per_token=flops_per_token)

    @property
    def speed(self) -> float:
        """Tokens per second.

        Raises:
            UserError: derived, and the cost of a token is not known.
        """
        if self.tokens_per_second is not None:
            return self.tokens_per_second
        if self.flops_per_token is None or self.peak_flops is None:
            raise UserError(
                "a speed derived from peak FLOP/s needs flops_per_token; give it, or take "
                "compute.for_model(training_flops(...))"
            )
        utilization = UTILIZATION if self.utilization is None else self.utilization
        return self.accelerators * self.peak_flops * utilization / self.flops_per_token

    def seconds(self, tokens: float) -> float:
        """Seconds to train on `tokens` tokens, padding included, without interruption."""
        return tokens / self.speed

    def fits(self, size: float) -> bool:
        """Whether `size` bytes fit into one accelerator, of which each holds the whole model.

        Raises:
            UserError: the memory is not known.
        """
        if self.memory_gib is None:
            raise UserError("memory_gib is not known; give it in the cloud's compute")
        return size <= self.memory_gib * 2**30
