"""Local steps and ranks by cloud, so that no cloud holds a round up.

A round of cloud c takes d_c + h_c s_c + u_c seconds: download, h_c local steps, upload. Balanced,
all take as long as the fastest with the most steps H: h_c = (T - d_c - u_c) / s_c, rounded down, at
least 1. Where a cloud's transfers alone take longer, a smaller rank helps if the rule and the sum
send less for it; it is taken if it makes the round of the cloud shorter by a tenth.

Memory is checked for every cloud whose memory is known; see `training_bytes`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedjax_llm.clouds import Cloud
from fedjax_llm.errors import UserError
from fedjax_llm.lora import target_names
from fedjax_llm.models import DecoderConfig
from fedjax_llm.models.config import projection_shapes

# Of its activations a layer keeps 34 values a position and unit of width, in 2 bytes each, and 5 a
# pair of positions and head (arXiv 2205.05198, equation 2, in bytes); recomputed, its input alone.
_KEPT, _ATTENTION, _RECOMPUTED = 34, 5, 2
# A trained number in float32: itself, its gradient, and two moments of Adam.
_TRAINED_BYTES = 16


@dataclass(frozen=True)
class Pace:
    """What a round of one cloud takes, seconds.

    Attributes:
        transfers: down and up.
        step: one local step.
    """

    transfers: float
    step: float

    def seconds(self, steps: int) -> float:
        """Of a round of so many local steps."""
        return self.transfers + steps * self.step


def balanced_steps(paces: Sequence[Pace], most: int) -> tuple[int, ...]:
    """Local steps by cloud, at most `most`, for rounds that take as long as that of the fastest.

    >>> balanced_steps([Pace(1.0, 1.0), Pace(1.0, 2.0), Pace(9.0, 2.0)], 8)
    (8, 4, 1)
    """
    whole = min(pace.seconds(most) for pace in paces)
    return tuple(
        min(most, max(1, math.floor((whole - pace.transfers) / pace.step + 1e-9))) for pace in paces
    )


def training_bytes(
    config: DecoderConfig,
    targets: Sequence[str],
    rank: int,
    *,
    value_bytes: int,
    rows: int,
    length: int,
    remat: bool,
) -> float:
    """Memory that training takes at its peak, an estimate: base, adapter and one micro-batch.

    Args:
        config: of the model.
        targets: patterns of adapted projections.
        rank: of the adapter.
        value_bytes: of a weight and an activation.
        rows: in a micro-batch.
        length: positions of a row.
        remat: whether activations are recomputed in the backward pass.
    """
    shapes = projection_shapes(config)
    vocabulary = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    matrices = config.num_layers * sum(d * f for d, f in shapes.values()) + vocabulary
    adapted = target_names(config, tuple(targets))
    adapter = config.num_layers * rank * sum(sum(shapes[name]) for name in adapted)
    kept = _KEPT * config.hidden_size + _ATTENTION * config.num_heads * length
    one = (_RECOMPUTED * config.hidden_size if remat else kept) * value_bytes / 2
    layers = one * config.num_layers + (kept * value_bytes / 2 if remat else 0)
    logits = 2 * 4 * config.vocab_size  # and their gradient, in float32
    return matrices * value_bytes + adapter * _TRAINED_BYTES + rows * length * (layers + logits)


def largest_ranks(
    clouds: Sequence[Cloud], ranks: Sequence[int], bytes_of: dict[int, float]
) -> tuple[int, ...]:
    """The largest of the ranks that fits the memory of each cloud; clouds that do not say take all.

    Args:
        clouds: in order.
        ranks: to choose among.
        bytes_of: memory by rank.

    Raises:
        UserError: the smallest does not fit some cloud.
    """
    found = []
    for cloud in clouds:
        compute = cloud.compute
        if compute is None or compute.memory_gib is None:
            found.append(max(ranks))
            continue
        fitting = [rank for rank in ranks if compute.fits(bytes_of[rank])]
        if not fitting:
            need = bytes_of[min(ranks)] / 2**30
            raise UserError(
                f"cloud {cloud.name!r} has {compute.memory_gib:g} GiB an accelerator and training "
                f"at rank {min(ranks)} takes about {need:.3g}; lower [training] microbatch or "
                "sequence_length, or set remat"
            )
        found.append(max(fitting))
    return tuple(found)
