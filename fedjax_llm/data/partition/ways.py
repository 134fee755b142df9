"""Ways to divide records: what a run file chooses, as objects over the functions beside them."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedjax_llm.data.partition.dirichlet import dirichlet, dirichlet_to_size
from fedjax_llm.data.partition.even import iid
from fedjax_llm.data.partition.keys import by_key
from fedjax_llm.data.partition.quantity import by_quantity
from fedjax_llm.data.partition.shards import by_shards
from fedjax_llm.data.records import Record
from fedjax_llm.data.splitting import group_key
from fedjax_llm.errors import UserError

Granularity = Literal["groups", "rows"]
# The fields of a record by which it can be divided.
KEYS = ("label", "user", "group", "source", "prompt", "context", "answer")


def partition(
    records: Sequence[Record],
    clients: int,
    way: "Way",
    seed: int,
    *,
    shares: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Divides records among clients.

    Args:
      records: N records, such as `Corpus.train_records`.
      clients: K, number of clients, at least 1.
      way: How.
      seed: Any integer.
      shares: K positive numbers, such as the clients' tokens per second: the sizes to aim for, to
        within the largest group (or key). None is equal sizes, except for `Dirichlet` and
        `Quantity`, where the draw decides.
      sizes: Size of each record, at least 1, such as its tokens; None counts records.

    Returns:
      K arrays of indices into `records`, int64, ascending, none of them empty; every index occurs
      exactly once.

    Raises:
      UserError: What cannot be divided so: a value out of range, a field that no record has, too
        few records, groups or keys, or a client that would come out empty (`EmptyClient`).
    """
    groups = [group_key(record) for record in records] if way.granularity == "groups" else None
    return way.divide(Task(records, groups, clients, seed, shares, sizes))


@dataclass(frozen=True)
class Task:
    """What a way is given; as `partition`, with the group of each record, or None for rows."""

    records: Sequence[Record]
    groups: Sequence[str] | None
    clients: int
    seed: int
    shares: Sequence[float] | None
    sizes: Sequence[int] | None

    @property
    def units(self) -> Sequence[str]:
        """The groups, or a name of its own for every row."""
        if self.groups is not None:
            return self.groups
        return [str(row) for row in range(len(self.records))]

    def column(self, key: str) -> list[str]:
        """A field of each record.

        Raises:
          UserError: Not one of `KEYS`, or empty in every record.
        """
        if key not in KEYS:
            raise UserError(f"key must be one of {', '.join(KEYS)}, got {key!r}")
        values = [str(getattr(record, key)) for record in self.records]
        if values and not any(values):
            raise UserError(
                f"cannot divide by {key}: none of the {len(values)} records has a {key}; set {key} "
                f"in the mapping, or divide by 'iid'"
            )
        return values

    def without_shares(self, why: str) -> None:
        """Raises UserError when shares are given to a way that has its own sizes."""
        if self.shares is not None:
            raise UserError(f"a division {why}, so that shares have no meaning; leave balance out")


@dataclass(frozen=True, kw_only=True)
class Way(abc.ABC):
    """How records are divided among clients.

    Attributes:
      granularity: "groups" keeps every group (`splitting.group_key`) with one client. "rows" lets
        the rows of a group come to several: what is held out for evaluation must then be chosen for
        all of them at once, or one client trains on what another evaluates.
    """

    granularity: Granularity = "groups"

    @abc.abstractmethod
    def divide(self, task: Task) -> list[np.ndarray]:
        """The rows of each client, as `partition` returns them."""


@dataclass(frozen=True, kw_only=True)
class Iid(Way):
    """At random, to equal sizes or by shares; see `even.iid`."""

    def divide(self, task: Task) -> list[np.ndarray]:
        return iid(task.units, task.clients, task.seed, shares=task.shares, sizes=task.sizes)


@dataclass(frozen=True, kw_only=True)
class Dirichlet(Way):
    """Skewed in labels: `dirichlet.dirichlet`, or with shares `dirichlet.dirichlet_to_size`."""

    concentration: float = 0.5

    def divide(self, task: Task) -> list[np.ndarray]:
        given = (task.column("label"), task.groups, task.clients, self.concentration, task.seed)
        if task.shares is None:
            return dirichlet(*given)
        return dirichlet_to_size(*given, shares=task.shares, sizes=task.sizes)


@dataclass(frozen=True, kw_only=True)
class Quantity(Way):
    """Skewed in size, by a power law where `exponent` is given; see `quantity.by_quantity`."""

    concentration: float = 0.5
    exponent: float | None = None

    def divide(self, task: Task) -> list[np.ndarray]:
        task.without_shares("by quantity draws the sizes")
        return by_quantity(
            task.units,
            task.clients,
            task.seed,
            concentration=self.concentration if self.exponent is None else None,
            exponent=self.exponent,
            sizes=task.sizes,
        )


@dataclass(frozen=True, kw_only=True)
class ByKey(Way):
    """Whole labels, users, sources or other fields of a record; see `keys.by_key`.

    Users, groups, prompts and contexts are the same up to case and spacing, as for
    `splitting.group_key`.
    """

    key: str = "label"

    def divide(self, task: Task) -> list[np.ndarray]:
        keys = task.column(self.key)
        if self.key in ("user", "group", "prompt", "context"):
            keys = [" ".join(key.casefold().split()) for key in keys]
        return by_key(
            keys,
            task.clients,
            task.seed,
            name=self.key,
            groups=task.groups,
            shares=task.shares,
            sizes=task.sizes,
        )


@dataclass(frozen=True, kw_only=True)
class Shards(Way):
    """A few pieces of the rows sorted by label for each client; see `shards.by_shards`."""

    shards: int = 2

    def divide(self, task: Task) -> list[np.ndarray]:
        task.without_shares("in shards gives every client as many of one size")
        labels = task.column("label")
        return by_shards(
            labels, task.groups, task.clients, self.shards, task.seed, sizes=task.sizes
        )
