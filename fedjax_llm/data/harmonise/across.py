"""Across clouds: duplicates that several clouds have are found and divided without showing text.

Every two clouds meet once, in the order of their names, each as a `Party` that holds its own rows
only. Rows that a cloud has lost in a meeting take no part in its later ones; hence, with kind
"exact", of a row that any number of clouds hold exactly one copy is left: in each meeting of two
holders one of them keeps it, and no two holders are left that have not met. With kind "near" the
one that is left may be another row that is like it.

Near duplicates are told by how many MinHash bands two rows share, because nobody can compare their
texts: `shared_bands` asks for as many as a pair at the threshold reaches with probability
`RECALL_ACROSS`. That is less sharp than the exact similarity inside a cloud; `Bands.probability`
tells how less.

Costs: with `private`, about 0.15 ms for each distinct band of each cloud in each meeting on one
core; with `keyed`, some microseconds. Messages hold 64 bytes a band.
"""

import hashlib
import itertools
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedjax_llm.data.harmonise.blinding import SECRET_BYTES, Blinding, Commutative, Keyed
from fedjax_llm.data.harmonise.duplicates import RECALL, Likeness
from fedjax_llm.data.harmonise.ledger import Step, counted
from fedjax_llm.data.harmonise.minhash import Bands, band_values, choose_bands, signatures
from fedjax_llm.data.harmonise.party import Party, meet
from fedjax_llm.data.harmonise.shingles import compared_text, exact_text, shingle
from fedjax_llm.data.records import Record
from fedjax_llm.errors import UserError

How = Literal["off", "keyed", "private"]

RECALL_ACROSS = 0.95
NAME = "duplicates in other clouds"


@dataclass(frozen=True)
class Meeting:
    """What passed between two clouds.

    Attributes:
      clouds: Their names, in order.
      lost: How many rows each of them lost.
      messages: All messages, in the order of `messages`.
    """

    clouds: tuple[str, str]
    lost: tuple[int, int]
    messages: tuple[bytes, ...] = field(repr=False)


def shared_bands(likeness: Likeness) -> tuple[Bands, int]:
    """How signatures are cut, and how many common bands make a near duplicate.

    Raises:
      UserError: A threshold or a number of hashes out of range.
    """
    bands = choose_bands(likeness.hashes, likeness.threshold, RECALL)
    return bands, bands.shared_at(likeness.threshold, RECALL_ACROSS)


def row_values(records: Sequence[Record], likeness: Likeness) -> tuple[list[list[bytes]], int]:
    """The values by which rows of different clouds are compared, and how many must be common.

    Args:
      records: N rows of one cloud.
      likeness: Kind "exact" makes one value a row, a hash of its text; "near" its bands.

    Returns:
      For each row its distinct values, and the number that makes two rows duplicates.
    """
    if likeness.kind == "exact":
        exact = [exact_text(record, likeness.compare) for record in records]
        return [[hashlib.blake2b(text.encode(), digest_size=32).digest()] for text in exact], 1
    texts = [compared_text(record, likeness.compare) for record in records]
    bands, shared = shared_bands(likeness)
    signature_NxK = signatures(shingle(texts), likeness.hashes, likeness.seed)
    return band_values(signature_NxK, bands), shared


def drop_across(
    clouds: Mapping[str, Sequence[Record]],
    likeness: Likeness,
    how: How,
    *,
    secret: Callable[[], bytes] = lambda: os.urandom(SECRET_BYTES),
    rng: random.Random | None = None,
) -> tuple[dict[str, list[Record]], dict[str, Step], list[Meeting]]:
    """Divides the rows that several clouds have among them.

    This plays all clouds in one process, as a simulation does; the parties exchange bytes only, so
    that each can run at its own cloud.

    Args:
      clouds: The rows of each cloud.
      likeness: When two rows are duplicates, kind "exact" or "near".
      how: "private" for commutative Diffie-Hellman, "keyed" for hashes under a shared secret.
      secret: Makes `SECRET_BYTES` bytes; from the operating system outside tests.
      rng: Shuffles and makes decoys; None is the operating system's generator.

    Returns:
      The rows that each cloud keeps in their order, the count of each cloud, and the meetings. Rows
      and counts depend on the data and the seed alone, not on secrets.

    Raises:
      UserError: A cloud is left with fewer than two rows; kind "off" while clouds are compared.
    """
    kept = {name: list(records) for name, records in clouds.items()}
    lost: dict[str, dict[str, int]] = {name: {} for name in clouds}
    if how == "off":
        return kept, {}, []
    if likeness.kind == "off":
        raise UserError(
            f'across = "{how}" finds duplicates and duplicates = "off" says that there are none; '
            'set duplicates = "exact" or "near"'
        )
    values: dict[str, list[list[bytes]]] = {}
    shared = 1
    for name, records in kept.items():
        values[name], shared = row_values(records, likeness)
    common = secret()  # of all clouds under `keyed`
    meetings = []
    for pair in itertools.combinations(sorted(clouds), 2):
        session = b"\0".join([b"fedjax-llm duplicates", *(name.encode() for name in pair)])

        def disguise(session: bytes = session) -> Blinding:
            return Keyed(common, session) if how == "keyed" else Commutative(secret(), session)

        one, two = (
            Party(values[name], shared, disguise(), first, likeness.seed, rng or _SYSTEM)
            for name, first in zip(pair, (True, False), strict=True)
        )
        *losses, messages = meet(one, two)
        for name, other, gone in zip(pair, reversed(pair), losses, strict=True):
            stay = sorted(set(range(len(kept[name]))) - set(gone))
            kept[name] = [kept[name][row] for row in stay]
            values[name] = [values[name][row] for row in stay]
            lost[name][f"kept by cloud {other!r}"] = len(gone)
        meetings.append(Meeting(pair, (len(losses[0]), len(losses[1])), tuple(messages)))
    steps = {
        name: Step(NAME, len(records), counted(lost[name])) for name, records in clouds.items()
    }
    for name, records in kept.items():
        if len(records) < 2 <= len(clouds[name]):
            raise UserError(
                f"cloud {name!r}: {len(clouds[name]) - len(records)} of its {len(clouds[name])} "
                "rows are duplicates that other clouds keep, which leaves too few to train and "
                'evaluate; add rows or leave the cloud out, or set [harmonise] across = "off"'
            )
    return kept, steps, meetings


_SYSTEM = random.SystemRandom()
