"""[partition]: one corpus divided among the clouds, and the keys that say how rows are divided.

The same keys divide the rows of a cloud among its own clients.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedjax_llm.runs.sections import toml_errors
from fedjax_llm.runs.sections.problem import problem
from fedjax_llm.runs.sections.types import (
    Count,
    MappingSection,
    NotNegative,
    Positive,
    Section,
    Texts,
    check_sources,
)

# As the packages below have them, which would bring JAX; a test compares the two.
How = Literal["iid", "dirichlet", "quantity", "label", "key", "shards"]
Key = Literal["label", "user", "group", "source", "prompt", "context", "answer"]
Granularity = Literal["groups", "rows"]

# Of each key, the ways that read it.
_READ_BY: dict[str, tuple[How, ...]] = {
    "concentration": ("dirichlet", "quantity"),
    "exponent": ("quantity",),
    "shards": ("shards",),
    "key": ("key",),
}
_BALANCED: tuple[How, ...] = ("iid", "dirichlet", "label", "key")


class DividingKeys(Section):
    """What the ways of dividing take.

    `concentration` is of "dirichlet" and "quantity"; with `exponent`, "quantity" follows a power
    law instead. `shards` is how many a client gets. `key` is the field of a record whose values
    stay whole. `granularity` "groups" keeps the rows of a question group (or a user) together.
    """

    concentration: Positive = 0.5
    exponent: NotNegative | None = None
    shards: Count = 2
    key: Key | None = None
    granularity: Granularity = "groups"


class PartitionSection(DividingKeys):
    """[partition]: one corpus for all clouds, which then have no data of their own.

    `how` is "iid", "dirichlet" (by label), "quantity" (labels alike, sizes not), "label" or "key"
    (whole labels or other keys), "shards". `balance` says what sizes to aim for: "equal", or by
    "speed" of the clouds' compute; left out, the way decides. `measure` says what a size is: rows
    or tokens. `seed` is of the division, the run's if left out.
    """

    sources: Texts
    mapping: MappingSection | None = None
    limit: Count | None = None
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    how: How = "iid"
    balance: Literal["equal", "speed"] | None = None
    measure: Literal["rows", "tokens"] = "rows"
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        check_sources(("sources",), self.sources, self.mapping)
        check_way((), "how", self.how, self)
        if self.balance is not None and self.how not in _BALANCED:
            raise problem(
                ("balance",), f'has no meaning with how = "{self.how}", which has its own sizes'
            )
        if self.measure == "tokens" and self.how == "dirichlet" and self.balance is None:
            raise problem(
                ("measure",), 'goes with balance = "equal" or "speed"; remove it', got=False
            )
        return self


def check_way(path: toml_errors.Path, name: str, how: How, keys: DividingKeys) -> None:
    """Refuses keys that a way does not read, and a way without the key that it needs.

    Args:
      path: of the section.
      name: what the key is called there that says how.
      how: its value.
      keys: the section.
    """
    for key, ways in _READ_BY.items():
        if getattr(keys, key) != _default(key) and how not in ways:
            words = " or ".join(toml_errors.shown(way) for way in ways)
            raise problem((*path, key), f"goes with {name} = {words}; remove it", got=False)
    if how == "key" and keys.key is None:
        raise problem(
            (*path, "key"), 'is missing: say which field stays whole, as key = "user"', got=False
        )
    if keys.exponent is not None and keys.concentration != _default("concentration"):
        raise problem(
            (*path, "concentration"), "does not go together with exponent; remove one", got=False
        )


def check_partition(
    section: PartitionSection | None,
    *,
    data: Sequence[bool],
    speed: Sequence[bool],
    harmonise: Sequence[bool],
    unit: str,
) -> None:
    """Every cloud gets its data from one place, and what the division needs is there.

    Args:
      section: of the run, or None.
      data: whether each cloud has data of its own.
      speed: whether each cloud says how fast it is.
      harmonise: whether each cloud harmonises in a way of its own.
      unit: [privacy] unit.
    """
    if section is None:
        if not all(data):
            raise problem(
                ("clouds", data.index(False)),
                "has no data; give it sources, or divide one corpus among all clouds by "
                "[partition]",
                got=False,
            )
        return
    if any(data):
        raise problem(
            ("clouds", data.index(True), "data"),
            "does not go with [partition], which gives each cloud its part of one corpus; remove "
            "one of them",
            got=False,
        )
    if any(harmonise):
        raise problem(
            ("clouds", harmonise.index(True), "harmonise"),
            "does not go with [partition], whose rows are harmonised before they are divided; move "
            "it to [harmonise]",
            got=False,
        )
    if section.balance == "speed" and not all(speed):
        raise problem(
            ("clouds", speed.index(False)),
            'says nothing of its speed, which [partition] balance = "speed" needs; give it '
            "compute = {tokens_per_second = 1000.0}, or an instance",
            got=False,
        )
    if section.granularity == "rows" and unit == "user":
        raise problem(
            ("partition", "granularity"),
            'gives the rows of one user to several clouds, and unit "user" covers those of one '
            'cloud only; use "groups"',
            refused=True,
        )


def _default(key: str) -> object:
    return DividingKeys.model_fields[key].default
