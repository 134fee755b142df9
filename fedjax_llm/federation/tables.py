"""The clouds and their rows, laid out for the batched program."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

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
    """

    cloud: Cloud
    train: Batch
    evaluation: Batch
    offline_rounds: frozenset[int] = frozenset()

    @classmethod
    def from_corpus(
        cls,
        cloud: Cloud,
        corpus: Corpus,
        *,
        evaluation_rows: int | None = None,
        offline_rounds: Iterable[int] = (),
    ) -> "Participant":
        """Takes a corpus's rows, of the held-out ones the first `evaluation_rows`."""
        evaluation = jax.tree.map(lambda leaf: leaf[:evaluation_rows], corpus.evaluation)
        return cls(cloud, corpus.train, evaluation, frozenset(offline_rounds))

    @property
    def rows(self) -> int:
        """Training rows it holds."""
        return len(self.train.tokens_BxT)


def sampler_of(participants: Sequence[Participant], training: LocalTraining) -> SamplerSpec:
    """What local training really does, for the accountant to compare with its plan."""
    if training.privacy is None:
        return SamplerSpec("fixed", (), training.steps)
    rates = tuple(training.batch_size / participant.rows for participant in participants)
    return SamplerSpec("full" if set(rates) == {1.0} else "poisson", rates, training.steps)


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
    return ClientTable(rows, jnp.asarray(sizes, jnp.int32), jnp.asarray(rates, jnp.float32))


def scaled_weights(weights: Sequence[float] | None, count: int) -> np.ndarray:
    """Public weights scaled to a largest of 1, float32 [K]; ones if None.

    Raises:
        UserError: not `count` positive finite numbers.
    """
    if weights is None:
        return np.ones(count, np.float32)
    scaled = np.asarray(weights, np.float32)
    if scaled.shape != (count,) or not np.all(np.isfinite(scaled)) or np.any(scaled <= 0):
        raise UserError(f"weights must be {count} positive numbers, got {list(weights)}")
    return scaled / scaled.max()
