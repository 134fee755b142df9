"""Clipping: the one place where the influence of a privacy unit on a sum is bounded.

| module | idea |
|---|---|
| `norm` | one tree, one norm |
| `kinds` | which coordinates share a norm, and the sensitivity that follows |
| `grad_sum` | sums of clipped per-example gradients, also over samples of dynamic size |
| `ghost` | the same sums without holding per-example gradients |
| `adaptive` | a clip norm that follows a private quantile |
"""

from .adaptive import AdaptiveClip as AdaptiveClip
from .adaptive import AdaptiveClipState as AdaptiveClipState
from .adaptive import indicator as indicator
from .adaptive import split_noise as split_noise
from .grad_sum import ClippedGradSum as ClippedGradSum
from .grad_sum import ClipStats as ClipStats
from .grad_sum import Method as Method
from .grad_sum import clipped_grad_sum as clipped_grad_sum
from .grad_sum import poisson_clipped_grad_sum as poisson_clipped_grad_sum
from .kinds import Clip as Clip
from .kinds import Joint as Joint
from .kinds import PerFactor as PerFactor
from .kinds import PerLayer as PerLayer
from .kinds import as_clip as as_clip
from .norm import clip as clip

__all__ = [
    "AdaptiveClip",
    "AdaptiveClipState",
    "Clip",
    "ClipStats",
    "ClippedGradSum",
    "Joint",
    "Method",
    "PerFactor",
    "PerLayer",
    "as_clip",
    "clip",
    "clipped_grad_sum",
    "indicator",
    "poisson_clipped_grad_sum",
    "split_noise",
]
