"""Decoders of the Llama family: configuration, weights, tokenizer, logits, loss, generation."""

from fedjax_llm.models.batch import Batch as Batch
from fedjax_llm.models.config import DecoderConfig as DecoderConfig
from fedjax_llm.models.config import RopeScaling as RopeScaling
from fedjax_llm.models.config import projection_shapes as projection_shapes
from fedjax_llm.models.decoder import apply as apply
from fedjax_llm.models.decoder import base_shapes as base_shapes
from fedjax_llm.models.decoder import hidden as hidden
from fedjax_llm.models.decoder import init_base as init_base
from fedjax_llm.models.generate import generate as generate
from fedjax_llm.models.hub import get as get_model
from fedjax_llm.models.loss import loss as loss
from fedjax_llm.models.loss import target_nll as target_nll
from fedjax_llm.models.model import Model as Model
from fedjax_llm.models.model import load_config as load_config
from fedjax_llm.models.model import load_model as load_model
from fedjax_llm.models.model import save_model as save_model
from fedjax_llm.models.quantised_base import base_bytes as base_bytes
from fedjax_llm.models.quantised_base import dequantised_base as dequantised_base
from fedjax_llm.models.quantised_base import quantised_base as quantised_base
from fedjax_llm.models.tokenizer import Tokenizer as Tokenizer
from fedjax_llm.models.tokenizer import load_tokenizer as load_tokenizer

__all__ = [
    "Batch",
    "DecoderConfig",
    "Model",
    "RopeScaling",
    "Tokenizer",
    "apply",
    "base_bytes",
    "base_shapes",
    "dequantised_base",
    "generate",
    "get_model",
    "hidden",
    "init_base",
    "load_config",
    "load_model",
    "load_tokenizer",
    "loss",
    "projection_shapes",
    "quantised_base",
    "save_model",
    "target_nll",
]
