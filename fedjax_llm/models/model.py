"""A model as read from a folder: configuration, frozen weights, tokenizer."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from fedjax_llm.errors import UserError
from fedjax_llm.models.checkpoint import CONFIG_FILE, read_base, read_json, write_base
from fedjax_llm.models.config import DecoderConfig
from fedjax_llm.models.decoder import Base
from fedjax_llm.models.quantised_base import KINDS, Kind
from fedjax_llm.models.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What a run needs of a pretrained model. The pure functions take ``config`` and ``base``.

    Attributes:
      config: Static description.
      base: Frozen weights, a nested dict of arrays with layers stacked [L, ...]; kernels may be
        quantised.
      tokenizer: Of the same folder.
      folder: Where it was read from.
    """

    config: DecoderConfig
    base: Base
    tokenizer: Tokenizer
    folder: Path


def load_model(
    folder: Path | str,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    quantised: Kind | None = None,
) -> Model:
    """Reads a Hugging Face folder: config.json, safetensors and tokenizer.

    Args:
      folder: The folder.
      dtype: Of the weights in memory.
      quantised: How the kernels of the layers are kept instead; embeddings, norms and biases stay
        in `dtype`. The model is never in memory as a whole in floats.

    Raises:
      UserError: Anything missing, damaged or unsupported, named with its file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a Hugging Face model")
    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{config.vocab_size}; they belong to different models"
        )
    quantise = None if quantised is None else KINDS[quantised]
    base = read_base(folder, config, dtype=dtype, quantise=quantise)
    return Model(config, base, tokenizer, folder)


def load_config(folder: Path | str) -> DecoderConfig:
    """Reads config.json, and from generation_config.json the tokens that end a text.

    Raises:
      UserError: A missing file or an unsupported model.
    """
    folder = Path(folder)
    config = DecoderConfig.from_hf(read_json(folder / CONFIG_FILE))
    if not (folder / "generation_config.json").exists():
        return config
    # Chat models end a turn with a token that config.json does not always list.
    more = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = [] if more is None else more if isinstance(more, list) else [more]
    return dataclasses.replace(
        config, eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *ends]))
    )


def save_model(
    folder: Path | str,
    config: DecoderConfig,
    base: Base,
    tokenizer: Tokenizer,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that ``load_model`` and Hugging Face transformers read.

    Raises:
      UserError: The folder already holds weights.
    """
    write_base(folder, config, base, max_shard_bytes=max_shard_bytes)
    tokenizer.save(folder)
