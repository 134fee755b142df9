"""Mixing: how much each domain of a cloud counts, by leaving rows out or repeating them.

A domain is the source or the label of a row. Its share of the training rows is given by explicit
weights, or by a temperature T as n^(1/T) over the domains' sizes n: 1 leaves the shares, larger
values move them towards equal ones (arXiv 1910.10683, section 3.5.2). From the shares follows a
rate for each domain, the expected copies of a row. Without repetition the largest rate is 1, which
leaves as many rows as the shares allow; with it the expected number of rows stays.

What happens to the unit of privacy. Whether a row is left out is decided for each row by itself, by
a keyed hash against its domain's rate; one row more or less never moves another. The rates follow
from the sizes of the domains, which are taken as public, as a privacy plan takes the number of
rows. So leaving out costs nothing of a guarantee per example. Repeating does: a row with r copies
contributes r clipped gradients and not one, its sensitivity is r times what the plan counts, and
the plan's epsilon would be that of a copy and not of an example. Run files refuse repetition with
units example and user.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedjax_llm.data.harmonise.ledger import Step, counted
from fedjax_llm.data.harmonise.shingles import content_of
from fedjax_llm.data.records import Record
from fedjax_llm.data.splitting import keyed_hash
from fedjax_llm.errors import UserError

By = Literal["source", "label"]
_RANGE = 1 << 64


@dataclass(frozen=True)
class Mix:
    """The shares of the domains of a cloud.

    Attributes:
      by: What a domain is.
      temperature: At least 1; goes without weights.
      weights: For each domain, its weight; only their ratios count. 0 leaves a domain out.
      repeat: Whether rows of scarce domains are repeated; otherwise others are left out.

    Raises:
      UserError: Neither or both of temperature and weights, or a value out of range.
    """

    by: By = "source"
    temperature: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    repeat: bool = False

    def __post_init__(self) -> None:
        """Checks the values."""
        if (self.temperature is None) == (not self.weights):
            given = "neither is" if self.temperature is None else "both are"
            raise UserError(f"mix takes temperature or weights, {given} given")
        if self.temperature is not None and not 1.0 <= self.temperature < math.inf:
            raise UserError(f"mix: temperature must be at least 1, got {self.temperature:g}")
        for domain, weight in self.weights.items():
            if not 0.0 <= weight < math.inf:
                raise UserError(f"mix: the weight of {domain!r} must be at least 0, got {weight:g}")
        if self.weights and not any(self.weights.values()):
            raise UserError("mix: all weights are 0, which leaves no row; raise one")


def rates(sizes: Mapping[str, int], mix: Mix) -> dict[str, float]:
    """The expected copies of a row of each domain.

    Args:
      sizes: Rows of each domain, each at least 1.
      mix: The shares.

    Returns:
      For each domain, `share * total / size`; at most 1 without repetition.

    Raises:
      UserError: The weights name a domain that is not there, or leave one out.

    Example:
      >>> rates({"a": 100, "b": 25}, Mix(weights={"a": 1.0, "b": 1.0}))
      {'a': 0.25, 'b': 1.0}
    """
    if mix.temperature is not None:
        raw = {domain: size ** (1.0 / mix.temperature) for domain, size in sizes.items()}
    else:
        for missing in (*(set(sizes) - set(mix.weights)), *(set(mix.weights) - set(sizes))):
            what = "has no weight" if missing in sizes else "is in no row"
            raise UserError(
                f"mix: {mix.by} {missing!r} {what}; weights must name {', '.join(sorted(sizes))}"
            )
        raw = {domain: mix.weights[domain] for domain in sizes}
    # Largest first: rows for one unit of weight, of the domain that runs out first.
    per_weight = [sizes[domain] / weight for domain, weight in raw.items() if weight > 0]
    total = sum(sizes.values()) / sum(raw.values()) if mix.repeat else min(per_weight)
    return {
        domain: weight * total / sizes[domain]
        if mix.repeat
        else min(weight * total / sizes[domain], 1.0)
        for domain, weight in raw.items()
    }


def mix_records(records: Sequence[Record], mix: Mix, seed: int) -> tuple[list[Record], list[Step]]:
    """Leaves out and repeats training rows so that the domains have their shares.

    Copies follow their row. How many copies a row has depends on the row, its domain's rate and the
    seed, not on its place; of rows that are wholly equal, each is decided by itself.

    Args:
      records: The training rows of one cloud; evaluation is not mixed, so that its loss means the
        same whatever the shares.
      mix: The shares.
      seed: Any integer.

    Returns:
      The rows, and the count.

    Raises:
      UserError: As `rates`; or nothing is left.
    """
    domains = [getattr(record, mix.by) for record in records]
    if not any(domains):
        raise UserError(f"mix: no row has a {mix.by}; map it, or mix by another")
    rate = rates(Counter(domains), mix)
    seen: Counter[str] = Counter()
    kept: list[Record] = []
    out: Counter[str] = Counter()
    most = 0
    for record, domain in zip(records, domains, strict=True):
        whole, rest = divmod(rate[domain], 1.0)
        content = content_of(record)
        copies = int(whole) + (_uniform(content, seen[content], seed) < rest)
        seen[content] += 1
        kept += [record] * copies
        out[f"left out of {mix.by} {domain!r}"] += copies == 0
        most = max(most, copies)
    if not kept:
        raise UserError("mix: no row is left; raise the weights of domains that have rows")
    note = f"up to {most} copies of a row" if most > 1 else ""
    added = len(kept) - len(records) + sum(out.values())
    return kept, [Step("mixing", len(records), counted(out), added=added, note=note)]


def _uniform(content: str, occurrence: int, seed: int) -> float:
    """A number in [0, 1) that is the row's own."""
    return int.from_bytes(keyed_hash(f"mix\0{occurrence}\0{content}", seed)[:8], "big") / _RANGE
