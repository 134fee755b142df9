"""fedjax_llm: federated fine-tuning of language models across clouds, in JAX.

Everything a run file does can be composed from these objects; see `experiments/notebooks`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedjax_llm.aggregation import RULES as RULES
    from fedjax_llm.aggregation import FactorAveraging as FactorAveraging
    from fedjax_llm.aggregation import FedSvd as FedSvd
    from fedjax_llm.aggregation import FfaLora as FfaLora
    from fedjax_llm.aggregation import LossWeights as LossWeights
    from fedjax_llm.aggregation import Weights as Weights
    from fedjax_llm.clouds import Cloud as Cloud
    from fedjax_llm.clouds import Compute as Compute
    from fedjax_llm.clouds import Failures as Failures
    from fedjax_llm.clouds import Link as Link
    from fedjax_llm.clouds import Prices as Prices
    from fedjax_llm.clouds.schedules import Deadline as Deadline
    from fedjax_llm.clouds.schedules import Decoupled as Decoupled
    from fedjax_llm.clouds.schedules import FedBuff as FedBuff
    from fedjax_llm.clouds.schedules import Streaming as Streaming
    from fedjax_llm.clouds.schedules import Synchronous as Synchronous
    from fedjax_llm.compression import CODECS as CODECS
    from fedjax_llm.compression import Chain as Chain
    from fedjax_llm.compression import PowerSgd as PowerSgd
    from fedjax_llm.compression import Rotated as Rotated
    from fedjax_llm.compression import Sketch as Sketch
    from fedjax_llm.compression import TopMask as TopMask
    from fedjax_llm.compression import TurnMask as TurnMask
    from fedjax_llm.data import CorpusSpec as CorpusSpec
    from fedjax_llm.data import load_corpus as load_corpus
    from fedjax_llm.errors import Refused as Refused
    from fedjax_llm.errors import UserError as UserError
    from fedjax_llm.federation import Bfv as Bfv
    from fedjax_llm.federation import Ckks as Ckks
    from fedjax_llm.federation import Compression as Compression
    from fedjax_llm.federation import Federation as Federation
    from fedjax_llm.federation import Masked as Masked
    from fedjax_llm.federation import Participant as Participant
    from fedjax_llm.federation import Plain as Plain
    from fedjax_llm.federation import Selective as Selective
    from fedjax_llm.federation import Threshold as Threshold
    from fedjax_llm.lora import LoraConfig as LoraConfig
    from fedjax_llm.models import generate as generate
    from fedjax_llm.models import get_model as get_model
    from fedjax_llm.models import load_model as load_model
    from fedjax_llm.privacy import AdaptiveClip as AdaptiveClip
    from fedjax_llm.privacy import Banded as Banded
    from fedjax_llm.privacy import Buffered as Buffered
    from fedjax_llm.privacy import DiscreteGaussianShares as DiscreteGaussianShares
    from fedjax_llm.privacy import LambdaCgd as LambdaCgd
    from fedjax_llm.privacy import PerFactor as PerFactor
    from fedjax_llm.privacy import PerLayer as PerLayer
    from fedjax_llm.privacy import PrivacyPlan as PrivacyPlan
    from fedjax_llm.privacy import SkellamShares as SkellamShares
    from fedjax_llm.privacy import secret_key as secret_key
    from fedjax_llm.training import Drift as Drift
    from fedjax_llm.training import ExamplePrivacy as ExamplePrivacy
    from fedjax_llm.training import LocalTraining as LocalTraining

_HOMES = {
    "RULES": "aggregation",
    "FactorAveraging": "aggregation",
    "FedSvd": "aggregation",
    "FfaLora": "aggregation",
    "LossWeights": "aggregation",
    "Weights": "aggregation",
    "Drift": "training",
    "Bfv": "federation",
    "Ckks": "federation",
    "Cloud": "clouds",
    "CorpusSpec": "data",
    "ExamplePrivacy": "training",
    "Federation": "federation",
    "Link": "clouds",
    "LocalTraining": "training",
    "LoraConfig": "lora",
    "Masked": "federation",
    "Participant": "federation",
    "Plain": "federation",
    "PrivacyPlan": "privacy",
    "Refused": "errors",
    "Selective": "federation",
    "Threshold": "federation",
    "UserError": "errors",
    "generate": "models",
    "get_model": "models",
    "load_corpus": "data",
    "load_model": "models",
    "AdaptiveClip": "privacy",
    "Banded": "privacy",
    "Buffered": "privacy",
    "DiscreteGaussianShares": "privacy",
    "LambdaCgd": "privacy",
    "PerFactor": "privacy",
    "PerLayer": "privacy",
    "SkellamShares": "privacy",
    "secret_key": "privacy",
    "Compression": "federation",
    "TurnMask": "compression",
    "TopMask": "compression",
    "Sketch": "compression",
    "Rotated": "compression",
    "PowerSgd": "compression",
    "Chain": "compression",
    "CODECS": "compression",
    "Synchronous": "clouds.schedules",
    "Streaming": "clouds.schedules",
    "FedBuff": "clouds.schedules",
    "Decoupled": "clouds.schedules",
    "Deadline": "clouds.schedules",
    "Prices": "clouds",
    "Failures": "clouds",
    "Compute": "clouds",
}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Names are looked up on first use, so that `fedjax-llm --help` does not wait for JAX.
    if name not in _HOMES:
        raise AttributeError(f"module 'fedjax_llm' has no attribute {name!r}")
    return getattr(import_module(f"fedjax_llm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
