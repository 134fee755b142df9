"""The static description of a decoder, read from and written to a Hugging Face ``config.json``."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from fedjax_llm.errors import UserError

# Hugging Face's class name for each family, and what its config.json leaves unsaid.
_FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", "qkv_bias": False, "qk_norm": False},
    "MistralForCausalLM": {"model_type": "mistral", "qkv_bias": False, "qk_norm": False},
    "Qwen2ForCausalLM": {"model_type": "qwen2", "qkv_bias": True, "qk_norm": False},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "qkv_bias": False, "qk_norm": True},
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched to reach contexts longer than those trained on.

    Attributes:
      kind: "linear" divides every frequency by ``factor``; "llama3" divides the low frequencies,
        keeps the high ones and blends between (Llama 3.1's rule).
      factor: The stretch.
      low_freq_factor: llama3 only; wavelengths above ``original_max_positions / low_freq_factor``
        are divided.
      high_freq_factor: llama3 only; wavelengths below ``original_max_positions /
        high_freq_factor`` are kept.
      original_max_positions: llama3 only; the context length trained on, in tokens.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder of the Llama family. Hashable: a static argument of jit.

    Attributes:
      vocab_size: V, rows of the embedding.
      hidden_size: D, width of the residual stream.
      intermediate_size: Width of the gated feed-forward layer.
      num_layers: L.
      num_heads: Query heads.
      num_kv_heads: Key and value heads; divides ``num_heads``.
      head_dim: Width of one head; need not be ``hidden_size / num_heads``.
      rope_theta: Base of the rotary frequencies.
      rope_scaling: None for plain rotary positions.
      rms_norm_eps: Added to the mean square before the root.
      tie_embeddings: The output embedding is the input embedding.
      qkv_bias: Query, key and value projections have a bias (Qwen 2 and 2.5).
      qk_norm: Queries and keys are normalised per head before rotation (Qwen 3).
      max_positions: Longest sequence the model was made for, in tokens.
      sliding_window: Each position sees itself and at most this many tokens less one before it;
        None for no limit.
      bos_token_id: Start-of-sequence token, None if the model has none.
      eos_token_ids: Tokens that end a generated text; may be empty.
      architecture: Hugging Face's class name, such as "LlamaForCausalLM".
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 2048
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    architecture: str = "LlamaForCausalLM"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(
                    f"{name} must be a positive integer, got {value!r}; "
                    "mend the model's config.json"
                )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and "
                f"{self.num_heads}; mend the model's config.json"
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim must be even for rotary positions, got {self.head_dim}; "
                "mend the model's config.json"
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "DecoderConfig":
        """Reads the dictionary of a Hugging Face ``config.json``.

        Raises:
          UserError: An unknown architecture, a missing size, or a feature that this decoder does
            not compute; never a model that runs with a feature left out.
        """
        architecture = _architecture(values)
        family = _FAMILIES[architecture]
        missing = [name for name in _REQUIRED if values.get(name) is None]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}; download the model again")
        _refuse_unsupported(values)
        rope_theta, rope_scaling = _rope(values)
        heads = values["num_attention_heads"]
        eos = values.get("eos_token_id")
        qkv_bias = bool(values.get("attention_bias", False)) or family["qkv_bias"]
        if values.get("attention_bias") and not family["qkv_bias"]:
            raise UserError(
                f"attention_bias=true is not supported for {architecture}; use a model without it"
            )
        return cls(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or _default_head_dim(values, architecture),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=qkv_bias,
            qk_norm=family["qk_norm"],
            max_positions=values.get("max_position_embeddings", 2048),
            sliding_window=_sliding_window(values, architecture),
            bos_token_id=values.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            architecture=architecture,
        )

    def to_hf(self) -> dict[str, Any]:
        """The dictionary for ``config.json``; ``from_hf(to_hf())`` gives an equal config."""
        values: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": _FAMILIES[self.architecture]["model_type"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_positions,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) or None,
        }
        if self.architecture.startswith("Qwen"):
            values["use_sliding_window"] = self.sliding_window is not None
            values["max_window_layers"] = 0 if self.sliding_window is not None else self.num_layers
        if self.architecture != "LlamaForCausalLM":
            values["sliding_window"] = self.sliding_window
        if self.rope_scaling is not None:
            scaling = self.rope_scaling
            values["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
            if scaling.kind == "llama3":
                values["rope_scaling"] |= {
                    "low_freq_factor": scaling.low_freq_factor,
                    "high_freq_factor": scaling.high_freq_factor,
                    "original_max_position_embeddings": scaling.original_max_positions,
                }
        return values


def projection_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the seven linear projections of one layer, in the order of use."""
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    return {
        "q_proj": (width, queries),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (queries, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }


def _architecture(values: Mapping[str, Any]) -> str:
    names = values.get("architectures") or []
    if len(names) != 1 or names[0] not in _FAMILIES:
        found = ", ".join(map(str, names)) or "no name under architectures"
        raise UserError(
            f"config.json names {found}; supported architectures: {', '.join(_FAMILIES)}"
        )
    return str(names[0])


def _default_head_dim(values: Mapping[str, Any], architecture: str) -> int:
    if architecture == "Qwen3ForCausalLM":
        return 128  # the default of Hugging Face's Qwen3Config
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        raise UserError(
            f"hidden_size {width} is not a multiple of num_attention_heads {heads}; "
            "set head_dim in config.json"
        )
    return int(width // heads)


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(
            f"hidden_act={values['hidden_act']!r} is not supported; use a model with silu"
        )
    if values.get("mlp_bias"):
        raise UserError("mlp_bias=true is not supported; use a model without it")
    if values.get("quantization_config"):
        raise UserError(
            "quantization_config is not supported; use the unquantised model of the same name"
        )


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Both spellings: rope_theta with rope_scaling, and (transformers 5) rope_parameters."""
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"rope_scaling of type {kind!r} is not supported; supported: default, linear, llama3"
        )
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [name for name in names if name not in parameters]
    if missing:
        raise UserError(
            f"rope_scaling of type {kind!r} lacks {', '.join(missing)}; mend config.json"
        )
    factor = float(parameters["factor"])
    if not (math.isfinite(factor) and factor >= 1.0):
        raise UserError(f"rope_scaling factor must be at least 1, got {factor}; mend config.json")
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    if not high > low > 0.0:
        raise UserError(
            f"rope_scaling needs high_freq_factor above low_freq_factor above 0, got {high} and "
            f"{low}; mend config.json"
        )
    return theta, RopeScaling(
        "llama3",
        factor,
        low,
        high,
        int(parameters["original_max_position_embeddings"]),
    )


def _sliding_window(values: Mapping[str, Any], architecture: str) -> int | None:
    window = values.get("sliding_window")
    if architecture == "LlamaForCausalLM" or window is None:
        return None
    if architecture.startswith("Qwen"):
        if not values.get("use_sliding_window", False):
            return None
        full_layers = values.get("max_window_layers", 28)
        if full_layers >= values["num_hidden_layers"]:
            return None
        if full_layers > 0:
            raise UserError(
                f"max_window_layers={full_layers} mixes full and sliding attention, which is not "
                "supported; set use_sliding_window to false in config.json for shorter contexts"
            )
    return int(window)
