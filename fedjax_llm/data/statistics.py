"""Statistics: how many examples and tokens a corpus has, and how long they are."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedjax_llm.data.rendering import Rendered

_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class TokenStatistics:
    """Sizes of rendered examples.

    Attributes:
      examples: Number of examples.
      tokens: Tokens in all of them, without padding.
      target_tokens: Tokens under the loss mask.
      length_quantiles: Tokens of an example at the quantiles 0, 0.5, 0.9, 0.99 and 1 (the smallest
        length that at least that fraction of the examples does not exceed); zeros if none.
      target_quantiles: The same for the targets of an example.
    """

    examples: int
    tokens: int
    target_tokens: int
    length_quantiles: tuple[int, ...]
    target_quantiles: tuple[int, ...]

    def __str__(self) -> str:
        low, median, p90, p99, high = self.length_quantiles
        return (
            f"{self.examples} examples, {self.tokens} tokens ({self.target_tokens} targets), "
            f"length {low}..{high}, median {median}, 90% {p90}, 99% {p99}"
        )


def describe(rendered: Sequence[Rendered]) -> TokenStatistics:
    """Counts examples, tokens and targets.

    Example:
      >>> str(describe([Rendered([5, 6, 7], [False, True, True])]))
      '1 examples, 3 tokens (2 targets), length 3..3, median 3, 90% 3, 99% 3'
    """
    lengths = [len(example.tokens) for example in rendered]
    targets = [sum(example.loss_mask) for example in rendered]
    return TokenStatistics(
        examples=len(rendered),
        tokens=sum(lengths),
        target_tokens=sum(targets),
        length_quantiles=_quantiles(lengths),
        target_quantiles=_quantiles(targets),
    )


def _quantiles(values: Sequence[int]) -> tuple[int, ...]:
    if not values:
        return (0,) * len(_QUANTILES)
    ordered = sorted(values)
    last = len(ordered) - 1
    # Rounded up in integers: 0.9 * 10 must not become the tenth value through rounding errors.
    ranks = (-(-round(q * 100) * len(ordered) // 100) - 1 for q in _QUANTILES)
    return tuple(ordered[min(max(rank, 0), last)] for rank in ranks)
