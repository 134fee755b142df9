"""Lengths: rows that are too short to teach anything, or too long to be what they claim."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedjax_llm.data.harmonise.ledger import Step, counted
from fedjax_llm.data.records import Record
from fedjax_llm.errors import UserError


@dataclass(frozen=True)
class LengthLimits:
    """Bounds on prompt, context and answer together, both ends included; None is no bound.

    Attributes:
      min_characters: Fewest characters (Unicode code points).
      max_characters: Most characters.
      min_tokens: Fewest tokens of the base model, without what a chat template adds.
      max_tokens: Most tokens.

    Raises:
      UserError: A bound below 1, or a lower bound above its upper one.
    """

    min_characters: int | None = None
    max_characters: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Checks the bounds."""
        for name in ("characters", "tokens"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            for key, bound in ((f"min_{name}", low), (f"max_{name}", high)):
                if bound is not None and bound < 1:
                    raise UserError(f"{key} must be at least 1, got {bound}; leave it out")
            if low is not None and high is not None and low > high:
                raise UserError(
                    f"min_{name} = {low} is above max_{name} = {high}, which drops every row; "
                    f"lower min_{name}"
                )

    @property
    def in_tokens(self) -> bool:
        """Whether a tokenizer is needed to tell."""
        return self.min_tokens is not None or self.max_tokens is not None


def filter_lengths(
    records: Sequence[Record], limits: LengthLimits, encode: Callable[[str], Sequence[int]] | None
) -> tuple[list[Record], Step]:
    """Drops the records outside the limits.

    Whether a row stays depends on that row alone.

    Args:
      records: N records of one cloud.
      limits: The bounds.
      encode: From a text to its token ids, as `Tokenizer.encode`; None if no bound is in tokens.

    Returns:
      The records inside the limits in their order, and the count. A record outside several bounds
      counts under the first of them.

    Raises:
      UserError: A bound in tokens without a tokenizer.
    """
    if limits.in_tokens and encode is None:
        raise UserError(
            "min_tokens and max_tokens need a tokenizer; use min_characters and max_characters"
        )
    names = {
        f"shorter than {limits.min_characters} characters": 0,
        f"longer than {limits.max_characters} characters": 0,
        f"shorter than {limits.min_tokens} tokens": 0,
        f"longer than {limits.max_tokens} tokens": 0,
    }
    reasons = list(names)
    kept = []
    for record in records:
        parts = (record.context, record.prompt, record.answer)
        bounds = [(sum(map(len, parts)), limits.min_characters, limits.max_characters)]
        if limits.in_tokens and encode is not None:
            tokens = sum(len(encode(part)) for part in parts if part)
            bounds.append((tokens, limits.min_tokens, limits.max_tokens))
        outside = [
            broken
            for size, low, high in bounds
            for broken in (low is not None and size < low, high is not None and size > high)
        ]
        if any(outside):
            names[reasons[outside.index(True)]] += 1
        else:
            kept.append(record)
    return kept, Step("length", len(records), counted(names))
