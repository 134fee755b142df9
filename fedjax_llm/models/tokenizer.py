"""Tokenizers: text to token ids and back, the same in every cloud.

Built on the `tokenizers` library. A tokenizer is read from a Hugging Face folder, or from the
binary of llama2.c where a folder holds no `tokenizer.json`. Its `sha256` covers everything that
decides ids, so clouds can check that they share one tokenizer without sending it.
"""

import datetime
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from fedjax_llm.errors import UserError
from fedjax_llm.models import chat, llama2c

LLAMA2C_NAMES = ("tokenizer.bin", "tok512.bin")
_TOKEN_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with its special tokens and, where it has one, its chat template.

    Two tokenizers are equal when their `sha256` is.

    Attributes:
        json_text: the text of `tokenizer.json`, kept so that saving changes no byte of it.
        special_tokens: `{"bos_token": "<s>", ...}`, also visible to the chat template.
        chat_template: Jinja source, or None.
        bos_id: id that begins a sequence, or None where the model has none.
        eos_id: id that ends an answer.
        pad_id: id that fills rows; padding is masked, so it may be any id.
        sha256: hexadecimal hash of `tokenizer.json`, the template and the three ids.
    """

    backend: tokenizers.Tokenizer = field(repr=False, compare=False)
    json_text: str = field(repr=False, compare=False)
    special_tokens: Mapping[str, str] = field(repr=False, compare=False)
    chat_template: str | None = field(repr=False, compare=False)
    bos_id: int | None = field(compare=False)
    eos_id: int = field(compare=False)
    pad_id: int = field(compare=False)
    sha256: str

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included; a model's table may be larger."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can be used."""
        return self.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. Special tokens written out in the text become their ids."""
        return list(self._encode(text, add_special_tokens).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the `(start, end)` characters of `text` that it covers.

        Tokens that share one character (its bytes) all cover the whole character.
        """
        encoding = self._encode(text, False)
        return list(encoding.ids), list(encoding.offsets)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens))

    def render_chat(
        self,
        messages: Sequence[chat.Message],
        add_generation_prompt: bool = False,
        now: datetime.datetime | None = None,
    ) -> str:
        """A conversation as text; see `chat.render`.

        Raises:
            UserError: the model has no chat template, or the template refuses the conversation.
        """
        if self.chat_template is None:
            raise UserError(
                "this tokenizer has no chat template; use the template 'plain' or an instruct model"
            )
        return chat.render(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            now=now,
        )

    def save(self, folder: Path | str) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, each by atomic rename."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {key: self.special_tokens[key] for key in sorted(self.special_tokens)}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "tokenizer.json", self.json_text)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        _write(folder / "tokenizer_config.json", text)
        # A template file beside the config would win over the template in it.
        (folder / "chat_template.jinja").unlink(missing_ok=True)

    def _encode(self, text: str, add_special_tokens: bool) -> Any:
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            # The library says no more than that the text is none; Python can tell where.
            bad = next((i for i, c in enumerate(text) if 0xD800 <= ord(c) < 0xE000), None)
            if bad is None:
                raise
            raise UserError(
                f"text cannot be encoded: character {bad} is half of a surrogate pair; "
                "repair the file's encoding (UTF-8)"
            ) from None


def build_tokenizer(
    json_text: str,
    special_tokens: Mapping[str, str],
    chat_template: str | None = None,
    *,
    eos_id: int | None = None,
    origin: str = "tokenizer.json",
) -> Tokenizer:
    """A tokenizer from its parts.

    Args:
        json_text: text of a `tokenizer.json`.
        special_tokens: `bos_token`, `eos_token`, `pad_token`, `unk_token`, each optional.
        chat_template: Jinja source or None.
        eos_id: the end token where `special_tokens` does not name one.
        origin: what to call the source in errors.

    Raises:
        UserError: not a valid tokenizer, a special token that it does not hold, or no end token.
    """
    try:
        backend = tokenizers.Tokenizer.from_str(json_text)
    # The library raises plain Exception for whatever it finds wrong.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{origin} is not a valid tokenizer: {reason}; fetch it again") from error
    # A batch pads and truncates in one place only; settings stored in the file would do it twice.
    backend.no_truncation()
    backend.no_padding()
    ids: dict[str, int] = {}
    for key, token in special_tokens.items():
        index = backend.token_to_id(token)
        if index is not None:
            ids[key] = index
        elif key in ("bos_token", "eos_token", "pad_token"):
            raise UserError(
                f"{origin} holds no token {token!r}, which is named as {key}; "
                "correct tokenizer_config.json"
            )
    end = ids.get("eos_token", eos_id)
    if end is None:
        raise UserError(f"{origin} has no end token; name eos_token in tokenizer_config.json")
    if not 0 <= end < backend.get_vocab_size():
        raise UserError(f"end token {end} is outside {origin}; correct eos_token_id in config.json")
    bos, pad = ids.get("bos_token"), ids.get("pad_token", end)
    digest = hashlib.sha256()
    for part in (json_text, chat_template or "", f"{bos} {end} {pad}"):
        data = part.encode("utf-8")
        # The length in front keeps two different splits of one byte string apart.
        digest.update(len(data).to_bytes(8, "little") + data)
    tokens = dict(special_tokens)
    if "eos_token" not in tokens:
        tokens["eos_token"] = str(backend.id_to_token(end))
    return Tokenizer(backend, json_text, tokens, chat_template, bos, end, pad, digest.hexdigest())


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Reads the tokenizer of a model folder.

    `tokenizer.json` with `tokenizer_config.json` and `special_tokens_map.json`; where there is no
    `tokenizer.json`, llama2.c's `tokenizer.bin` or `tok512.bin`.

    Raises:
        UserError: no tokenizer in the folder, or a file that is truncated or invalid.
    """
    folder = Path(folder)
    model_config = _read_json(folder / "config.json")
    json_path = folder / "tokenizer.json"
    if not json_path.is_file():
        binary = next((folder / n for n in LLAMA2C_NAMES if (folder / n).is_file()), None)
        if binary is None:
            raise UserError(
                f"no tokenizer in {folder}: it needs tokenizer.json (or llama2.c's tokenizer.bin); "
                "copy the tokenizer's files beside the weights"
            )
        json_text = llama2c.tokenizer_json(binary, model_config.get("vocab_size"))
        special = {"bos_token": llama2c.BOS, "eos_token": llama2c.EOS, "unk_token": llama2c.UNKNOWN}
        return build_tokenizer(json_text, special, origin=str(binary))
    config = _read_json(folder / "tokenizer_config.json")
    special = {}
    for source in (_read_json(folder / "special_tokens_map.json"), config):
        for key in _TOKEN_KEYS:
            token = source.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special[key] = token
    end = _read_json(folder / "generation_config.json").get(
        "eos_token_id", model_config.get("eos_token_id")
    )
    end = end[0] if isinstance(end, list) and end else end
    return build_tokenizer(
        _read_text(json_path),
        special,
        _chat_template(folder, config),
        eos_id=end if isinstance(end, int) else None,
        origin=str(json_path),
    )


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        try:
            named = {entry["name"]: entry["template"] for entry in template}
        except (TypeError, KeyError) as error:
            raise UserError(
                f"chat_template in {folder / 'tokenizer_config.json'} is a list without "
                "'name' and 'template'; make it one string"
            ) from error
        if len(named) == 1:
            template = next(iter(named.values()))
        elif "default" in named:
            template = named["default"]
        else:
            raise UserError(
                f"chat_template in {folder / 'tokenizer_config.json'} has no template named "
                f"'default', only {sorted(named)}; rename the one to use"
            )
    if template is not None and not isinstance(template, str):
        raise UserError(
            f"chat_template in {folder / 'tokenizer_config.json'} is not text; make it one string"
        )
    return template


def _read_text(path: Path) -> str:
    try:
        # newline="" keeps every byte: the hash must not depend on the reader's platform.
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the folder") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; fetch it again")
    return value


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; free space there") from error
