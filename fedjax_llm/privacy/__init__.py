"""Differential privacy: clipping, exact Poisson sampling, Gaussian noise, and the plan that binds
them to an accountant so that they cannot disagree."""

from .clipping import ClippedGradSum as ClippedGradSum
from .clipping import ClipStats as ClipStats
from .clipping import clip as clip
from .clipping import clipped_grad_sum as clipped_grad_sum
from .clipping import poisson_clipped_grad_sum as poisson_clipped_grad_sum
from .epsilon import EpsilonReport as EpsilonReport
from .epsilon import EpsilonRow as EpsilonRow
from .noise import gaussian_noise_like as gaussian_noise_like
from .plan import PrivacyPlan as PrivacyPlan
from .plan import check_weights as check_weights
from .sampler import SamplerSpec as SamplerSpec
from .sampling import float32_rate as float32_rate
from .sampling import poisson_sample as poisson_sample
from .sampling import uniform_batches as uniform_batches

__all__ = [
    "ClipStats",
    "ClippedGradSum",
    "EpsilonReport",
    "EpsilonRow",
    "PrivacyPlan",
    "SamplerSpec",
    "check_weights",
    "clip",
    "clipped_grad_sum",
    "float32_rate",
    "gaussian_noise_like",
    "poisson_clipped_grad_sum",
    "poisson_sample",
    "uniform_batches",
]
