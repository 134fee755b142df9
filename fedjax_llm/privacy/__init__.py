"""Differential privacy: clipping, exact Poisson sampling, Gaussian noise, and the plan that binds
them to an accountant so that they cannot disagree."""

from .clipping import AdaptiveClip as AdaptiveClip
from .clipping import AdaptiveClipState as AdaptiveClipState
from .clipping import Clip as Clip
from .clipping import ClippedGradSum as ClippedGradSum
from .clipping import ClipStats as ClipStats
from .clipping import Joint as Joint
from .clipping import PerFactor as PerFactor
from .clipping import PerLayer as PerLayer
from .clipping import as_clip as as_clip
from .clipping import clip as clip
from .clipping import clipped_grad_sum as clipped_grad_sum
from .clipping import indicator as indicator
from .clipping import poisson_clipped_grad_sum as poisson_clipped_grad_sum
from .clipping import split_noise as split_noise
from .correlated import Banded as Banded
from .correlated import Buffered as Buffered
from .correlated import Correlation as Correlation
from .correlated import Independent as Independent
from .correlated import LambdaCgd as LambdaCgd
from .epsilon import EpsilonReport as EpsilonReport
from .epsilon import EpsilonRow as EpsilonRow
from .integer_mechanism import IntegerMechanism as IntegerMechanism
from .integer_noise import DiscreteGaussianShares as DiscreteGaussianShares
from .integer_noise import SkellamShares as SkellamShares
from .noise import gaussian_noise_like as gaussian_noise_like
from .plan import PrivacyPlan as PrivacyPlan
from .sampler import SamplerSpec as SamplerSpec
from .sampling import float32_rate as float32_rate
from .sampling import poisson_sample as poisson_sample
from .sampling import uniform_batches as uniform_batches
from .secret_keys import is_secret as is_secret
from .secret_keys import secret_key as secret_key
from .weights import check_weights as check_weights

__all__ = [
    "AdaptiveClip",
    "AdaptiveClipState",
    "Banded",
    "Buffered",
    "Clip",
    "ClipStats",
    "ClippedGradSum",
    "Correlation",
    "DiscreteGaussianShares",
    "EpsilonReport",
    "EpsilonRow",
    "Independent",
    "IntegerMechanism",
    "Joint",
    "LambdaCgd",
    "PerFactor",
    "PerLayer",
    "PrivacyPlan",
    "SamplerSpec",
    "SkellamShares",
    "as_clip",
    "check_weights",
    "clip",
    "clipped_grad_sum",
    "float32_rate",
    "gaussian_noise_like",
    "indicator",
    "is_secret",
    "poisson_clipped_grad_sum",
    "poisson_sample",
    "secret_key",
    "split_noise",
    "uniform_batches",
]
