"""What one cloud trains on and how it becomes rows, as its part of the run file says."""

from dataclasses import dataclass, field

from fedjax_llm.data.harmonise.pipeline import Harmonise
from fedjax_llm.data.mapping import Mapping
from fedjax_llm.data.partition import Iid, Way


@dataclass(frozen=True)
class CorpusSpec:
    """What a cloud trains on, as its part of the run file says.

    Attributes:
      sources: Paths, or embedded corpora such as "builtin:medical"; concatenated.
      mapping: From columns to records; None is for embedded corpora only, which know their own.
      limit: Use this many records after a shuffle by `seed`; None uses all.
      eval_fraction: Fraction of the records kept for evaluation, in (0, 1).
      template: "chat" or "plain".
      system: System message of every example, or None for the template's default.
      length: Tokens per row.
      packing: Several examples per row; must be False where an example is the unit of privacy.
      by_user: One training row a user, which is the unit of privacy; goes with one client.
      seed: Of the embedded corpora, the shuffle and the split.
      clients: Among how many clients of the cloud the training rows are divided.
      partition: How they are divided; see `partition.partition`.
      flipped: Whether the training answers are those of a label-flip attack.
      harmonise: What is done to the rows before they are divided; None does nothing.
    """

    sources: tuple[str, ...]
    mapping: Mapping | None = None
    limit: int | None = None
    eval_fraction: float = 0.1
    template: str = "chat"
    system: str | None = None
    length: int = 256
    packing: bool = False
    by_user: bool = False
    seed: int = 0
    clients: int = 1
    partition: Way = field(default_factory=Iid)
    flipped: bool = False
    harmonise: Harmonise | None = None
