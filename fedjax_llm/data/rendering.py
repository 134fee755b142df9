"""Rendering: a record as tokens, with the loss on what the model should say and nothing else."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from fedjax_llm.data.records import Record
from fedjax_llm.errors import UserError

TEMPLATES = ("chat", "plain")


class TextTokenizer(Protocol):
    """What rendering needs of a tokenizer; `fedjax_llm.models.tokenizer.Tokenizer` has it."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def has_chat_template(self) -> bool: ...
    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...
    def render_chat(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = False
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example as tokens.

    Attributes:
      tokens: Token ids, at most `max_length`.
      loss_mask: For each token, whether it is a target.
      cut: What did not fit: "nothing"; "context", shortened at its end or dropped; "answer",
        shortened at its end after the context was dropped, so that there is no end-of-turn token
        either; "all", when no token of the answer fits and the example teaches nothing.
      user: Whose it is; empty where that is not known.
    """

    tokens: list[int]
    loss_mask: list[bool]
    cut: Literal["nothing", "context", "answer", "all"] = "nothing"
    user: str = ""


@dataclass(frozen=True)
class RenderReport:
    """Counts of `render_all`: records that came in, and what became of them.

    Attributes:
      records: Records that came in.
      kept: Examples that came out; `records` less `lost`.
      context_cut: Kept examples whose context was shortened or dropped, with the answer whole.
      answer_cut: Kept examples whose answer was shortened.
      lost: Records dropped because no token of the answer fits.
    """

    records: int
    kept: int
    context_cut: int = 0
    answer_cut: int = 0
    lost: int = 0


def render(
    record: Record,
    tokenizer: TextTokenizer,
    template: str = "chat",
    max_length: int = 512,
    system: str | None = None,
) -> Rendered:
    r"""Renders a record as tokens with a loss mask.

    The mask is computed, not counted: the conversation is rendered with the answer and with another
    answer, the answer begins at the first character in which the two differ, and the tokens that
    overlap it are the targets. Hence an answer that also occurs in the prompt is found in the right
    place, and a token that straddles the start of the answer is a target.
    The end-of-turn marker is a target too; what a template prints after it is left out.

    Template "plain" is ``{system}\n{context}\n{prompt}\n{answer}`` (empty parts without their line
    end) and the end token. A record without prompt and context is plain text in either template:
    every token is a target except the first.

    Args:
      record: The record; its texts are as `map_rows` left them.
      tokenizer: Tokenizer of the base model.
      template: "chat", the template of the tokenizer, or "plain".
      max_length: Most tokens to return. What does not fit is cut as `Rendered.cut` says; the
        prompt is never cut.
      system: System message, or None for the template's own default.

    Raises:
      UserError: Unknown template, `max_length` below 2, a tokenizer without chat template, or a
        chat template that does not print the answer as it is.
    """
    if template not in TEMPLATES:
        raise UserError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    if max_length < 2:
        raise UserError(f"max_length must be at least 2 tokens, got {max_length}")
    if template == "chat" and not tokenizer.has_chat_template:
        raise UserError("this tokenizer has no chat template; set template = 'plain'")
    tokens, mask = _tokens(record, tokenizer, template, system)
    if len(tokens) <= max_length:
        return Rendered(tokens, mask)
    if record.context and record.prompt:
        fitted = _fit_context(record, tokenizer, template, max_length, system)
        if fitted is not None:
            return fitted
        tokens, mask = _tokens(replace(record, context=""), tokenizer, template, system)
        if len(tokens) <= max_length:
            return Rendered(tokens, mask, "context")
    tokens, mask = tokens[:max_length], mask[:max_length]
    return Rendered(tokens, mask, "answer" if any(mask) else "all")


def render_all(
    records: Sequence[Record],
    tokenizer: TextTokenizer,
    template: str = "chat",
    max_length: int = 512,
    system: str | None = None,
) -> tuple[list[Rendered], RenderReport]:
    """Renders records, drops those that teach nothing, and counts what was cut or dropped."""
    rendered = [
        replace(render(record, tokenizer, template, max_length, system), user=record.user)
        for record in records
    ]
    kept = [example for example in rendered if example.cut != "all"]
    report = RenderReport(
        records=len(rendered),
        kept=len(kept),
        context_cut=sum(example.cut == "context" for example in kept),
        answer_cut=sum(example.cut == "answer" for example in kept),
        lost=len(rendered) - len(kept),
    )
    return kept, report


def prompt_text(
    record: Record, tokenizer: TextTokenizer, template: str = "chat", system: str | None = None
) -> str:
    """The text after which the model is to say the answer, for generation."""
    if template == "plain":
        return "".join(f"{part}\n" for part in (system, record.context, record.prompt) if part)
    return tokenizer.render_chat(_messages(record, system), add_generation_prompt=True)


def _chat_text(record: Record, answer: str, tokenizer: TextTokenizer, system: str | None) -> str:
    reply = {"role": "assistant", "content": answer}
    return tokenizer.render_chat([*_messages(record, system), reply])


def _messages(record: Record, system: str | None) -> list[dict[str, str]]:
    user = "\n\n".join(part for part in (record.context, record.prompt) if part)
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": user}]


def _tokens(
    record: Record, tokenizer: TextTokenizer, template: str, system: str | None
) -> tuple[list[int], list[bool]]:
    """Renders without a limit of length."""
    if not (record.prompt or record.context):
        tokens = [*_bos(tokenizer), *tokenizer.encode(record.answer), tokenizer.eos_id]
        return tokens, [False, *[True] * (len(tokens) - 1)]
    if template == "plain":
        prefix = prompt_text(record, tokenizer, template, system)
        ids, offsets = tokenizer.encode_with_offsets(prefix + record.answer)
        mask = _overlap(offsets, len(prefix), len(prefix) + len(record.answer))
        bos = _bos(tokenizer)
        return [*bos, *ids, tokenizer.eos_id], [*[False] * len(bos), *mask, True]
    full = _chat_text(record, record.answer, tokenizer, system)
    # Another answer with another first letter: the two texts part where the answer begins.
    other = next(letter for letter in "xy" if letter != record.answer[0])
    start = _common_prefix(full, _chat_text(record, other, tokenizer, system))
    if not full.startswith(record.answer, start):
        raise UserError(
            f"the chat template does not print the answer {record.answer[:40]!r} as it is; "
            f"set template = 'plain'"
        )
    marker = re.match(r"\s*\S+", full[start + len(record.answer) :])
    stop = start + len(record.answer) + (marker.end() if marker else 0)
    ids, offsets = tokenizer.encode_with_offsets(full)
    mask = _overlap(offsets, start, stop)
    length = max((i + 1 for i, target in enumerate(mask) if target), default=0)
    ids, mask = ids[:length], mask[:length]
    if marker is None:  # without an end the model would never learn to stop
        return [*ids, tokenizer.eos_id], [*mask, True]
    return ids, mask


def _fit_context(
    record: Record, tokenizer: TextTokenizer, template: str, max_length: int, system: str | None
) -> Rendered | None:
    """Shortens the context at its end until the example fits; None if it has to go altogether."""
    # The beginning of a passage says what it is about, so the end is what goes.
    _, offsets = tokenizer.encode_with_offsets(record.context)
    keep = len(offsets)
    over = len(_tokens(record, tokenizer, template, system)[0]) - max_length
    while over > 0:
        # Tokens merge across the cut, so the count is exact only after rendering again.
        keep -= over
        if keep <= 0:
            return None
        shortened = replace(record, context=record.context[: offsets[keep - 1][1]].strip())
        tokens, mask = _tokens(shortened, tokenizer, template, system)
        over = len(tokens) - max_length
    return Rendered(tokens, mask, "context")


def _common_prefix(one: str, two: str) -> int:
    pairs = enumerate(zip(one, two, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(two)))


def _overlap(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> list[bool]:
    return [begin < stop and end > start for begin, end in offsets]


def _bos(tokenizer: TextTokenizer) -> list[int]:
    """The token that the model expects before a text, if its tokenizer puts one there."""
    # Some models name a begin token without using it (SmolLM2), so the tokenizer is asked.
    first = tokenizer.encode("a", add_special_tokens=True)[:1]
    return first if first and first[0] == tokenizer.bos_id else []
