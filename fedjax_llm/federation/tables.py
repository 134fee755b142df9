"""The clouds and their rows, laid out for the batched program."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fedjax_llm.clouds import Cloud
from fedjax_llm.data import Corpus
from fedjax_llm.errors import UserError
from fedjax_llm.models import Batch
from fedjax_llm.privacy import SamplerSpec
from fedjax_llm.training import ClientTable, LocalTraining


@dataclass(frozen=True)
class Participant:
    """A cloud with its data, which never leaves it.

    Attributes:
        cloud: name and link.
        train: its training rows [N, T], numpy; with example privacy a row is one example.
        evaluation: its held-out rows [E, T], numpy.
        offline_rounds: rounds in which it cannot be reached: it neither trains nor decrypts.
        client: a name of its own where several clients run in one cloud: their updates are summed
            inside it before anything leaves; None for the only one.
        rank: of what it trains, at most the adapter's; the adapter's if None.
        local_steps: it takes in a round, at most `LocalTraining.steps`; all of them if None.
        batch_size: rows of each of its steps (expected, where they are sampled), a public number,
            at most `LocalTraining.batch_size`; that if None.
    """

    cloud: Cloud
    train: Batch
    evaluation: Batch
    offline_rounds: frozenset[int] = frozenset()
    client: str | None = None
    rank: int | None = None
    local_steps: int | None = None
    batch_size: int | None = None

    @property
    def name(self) -> str:
        """Of the client; the cloud's if it is the only one there."""
        return self.client or self.cloud.name

    @classmethod
    def from_corpus(
        cls,
        cloud: Cloud,
        corpus: Corpus,
        *,
        evaluation_rows: int | None = None,
        offline_rounds: Iterable[int] = (),
        **settings: Any,
    ) -> "Participant":
        """Takes a corpus's rows, of the held-out ones the first `evaluation_rows`.

        `settings` are the other attributes.
        """
        evaluation = jax.tree.map(lambda leaf: leaf[:evaluation_rows], corpus.evaluation)
        return cls(cloud, corpus.train, evaluation, frozenset(offline_rounds), **settings)

    def divided(self, client_rows: Sequence[int]) -> list["Participant"]:
        """This cloud as several clients, called `NAME-1`, `NAME-2` and so on; itself if one.

        Args:
            client_rows: training rows of each, in their order; held-out rows are dealt in turn.
        """
        count = len(client_rows)
        if count == 1:
            return [self]
        ends = np.cumsum(client_rows)

        def rows_of(k: int) -> Batch:
            return jax.tree.map(lambda leaf: leaf[ends[k] - client_rows[k] : ends[k]], self.train)

        def held_out(k: int) -> Batch:
            return jax.tree.map(lambda leaf: leaf[k::count], self.evaluation)

        return [
            replace(
                self,
                train=rows_of(k),
                evaluation=held_out(k),
                client=f"{self.cloud.name}-{k + 1}",
            )
            for k in range(count)
        ]

    @property
    def rows(self) -> int:
        """Training rows it holds."""
        return len(self.train.tokens_BxT)


def batch_of(participant: Participant, training: LocalTraining) -> int:
    """Rows that a client takes in a step, or expects to where they are sampled."""
    own = participant.batch_size
    return training.batch_size if own is None else own


def sampler_of(participants: Sequence[Participant], training: LocalTraining) -> SamplerSpec:
    """What local training really does, for the accountant to compare with its plan.

    A client's rate is its own batch over its own rows: the one by which its rows are drawn, and by
    which its epsilon is counted.
    """
    if training.privacy is None:
        return SamplerSpec("fixed", (), training.steps)
    period = training.privacy.period
    rates = tuple(
        min(1.0, batch_of(participant, training) * period / participant.rows)
        for participant in participants
    )
    kind: Literal["full", "poisson"] = "full" if set(rates) == {1.0} else "poisson"
    return SamplerSpec(kind, rates, training.steps, period)


def client_tables(participants: Sequence[Participant], training: LocalTraining) -> ClientTable:
    """The clouds' rows in one table [K, N, T], shorter ones padded with empty rows."""
    sizes = [participant.rows for participant in participants]
    lengths = {participant.train.tokens_BxT.shape[1] for participant in participants}
    if len(lengths) != 1:
        raise UserError(f"all clouds need rows of one length, got {sorted(lengths)} tokens")

    def stack(*leaves: np.ndarray) -> np.ndarray:
        padding = [[(0, max(sizes) - len(leaf)), (0, 0)] for leaf in leaves]
        return np.stack([np.pad(leaf, pad) for leaf, pad in zip(leaves, padding, strict=True)])

    rows = jax.tree.map(stack, *[participant.train for participant in participants])
    # From the sampler's own description, so that what is drawn is what is accounted for.
    rates = sampler_of(participants, training).rates or (0.0,) * len(sizes)
    table = ClientTable(rows, jnp.asarray(sizes, jnp.int32), jnp.asarray(rates, jnp.float32))
    if training.privacy is None or training.privacy.period == 1:
        return table
    turns = [_turns(participant, training.privacy.period) for participant in participants]
    padded = [np.pad(own, (0, max(sizes) - len(own))) for own in turns]
    return table._replace(turns=jnp.asarray(np.stack(padded), jnp.int32))


def table_shapes(participants: Sequence[Participant], training: LocalTraining) -> ClientTable:
    """Shapes and types of `client_tables`, which are not made."""
    count, most = len(participants), max(participant.rows for participant in participants)
    shape: Any = jax.ShapeDtypeStruct
    rows = jax.tree.map(
        lambda leaf: shape((count, most, *leaf.shape[1:]), leaf.dtype), participants[0].train
    )
    takes_turns = training.privacy is not None and training.privacy.period > 1
    return ClientTable(
        rows,
        shape((count,), jnp.int32),
        shape((count,), jnp.float32),
        shape((count, most), jnp.int32) if takes_turns else None,
    )


def _turns(participant: Participant, period: int) -> NDArray[np.int32]:
    """In which step of every period a row's turn is, by a hash of the row alone.

    Its place among the others would not do: it would change when another row is added.
    """
    leaves = jax.tree.leaves(participant.train)
    digests = (
        hashlib.blake2b(b"".join(np.ascontiguousarray(leaf[i]).tobytes() for leaf in leaves))
        for i in range(participant.rows)
    )
    return np.array([int.from_bytes(d.digest()[:8], "little") % period for d in digests], np.int32)


def check_participants(
    participants: Sequence[Participant], rank: int, training: LocalTraining, ranks_differ: bool
) -> None:
    """Refuses participants that do not fit each other or the run.

    Args:
        participants: the clients.
        rank: of the adapter.
        training: with the most local steps, and the largest batch.
        ranks_differ: whether the rule can have different ranks.

    Raises:
        UserError: none, two of one name, one cloud described in two ways, a rank, a number of
            steps or a batch out of range, different ranks under a rule that cannot have them.
    """
    if not participants:
        raise UserError("a run needs at least one cloud; name one in the run file")
    clouds: dict[str, Cloud] = {}
    names: set[str] = set()
    for participant in participants:
        cloud, name = participant.cloud, participant.name
        if name in names:
            what = "client" if participant.client else "cloud"
            raise UserError(f"{what} name {name!r} is used twice; give each {what} its own")
        if clouds.setdefault(cloud.name, cloud) != cloud:
            raise UserError(f"cloud {cloud.name!r} has two links; its clients share one")
        names.add(name)
        own = rank if participant.rank is None else participant.rank
        if not 1 <= own <= rank:
            raise UserError(
                f"rank of {name!r} must be between 1 and {rank}, the adapter's rank, got {own}"
            )
        if own != rank and not ranks_differ:
            raise UserError(
                f"the rule takes one rank for all, {name!r} has {own} and the adapter {rank}; "
                "leave ranks out, or choose a rule with `ranks` in `fedjax-llm rules`"
            )
        for what, found, most in (
            ("local steps", participant.local_steps, training.steps),
            ("batch size", participant.batch_size, training.batch_size),
        ):
            if found is not None and not 1 <= found <= most:
                raise UserError(
                    f"{what} of {name!r} must be between 1 and {most}, the run's, got {found}"
                )


def clouds_of(participants: Sequence[Participant]) -> tuple[tuple[Cloud, ...], tuple[int, ...]]:
    """The clouds in the order in which they first occur, and the place of each client's cloud."""
    clouds = list(dict.fromkeys(participant.cloud for participant in participants))
    return tuple(clouds), tuple(clouds.index(participant.cloud) for participant in participants)
