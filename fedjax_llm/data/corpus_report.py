"""Where the rows of one cloud went, for the user to read; no row disappears uncounted."""

from dataclasses import dataclass

from fedjax_llm.data.harmonise.ledger import Ledger
from fedjax_llm.data.mapping import MappingReport
from fedjax_llm.data.rendering import RenderReport
from fedjax_llm.data.statistics import TokenStatistics


@dataclass(frozen=True)
class CorpusReport:
    """Where every row of a cloud went; no row disappears uncounted.

    `mapping.rows` = dropped by the mapping + `over_limit` + training and evaluation records.
    `over_row` of the training records did not fit into their users' rows. `ledger` has every step
    of harmonisation, from the rows read to the records for training and evaluation; None without.
    Where one corpus was divided among clouds, `whole` is its ledger, and `ledger` begins after it.
    """

    mapping: MappingReport
    over_limit: int
    train_rendering: RenderReport
    evaluation_rendering: RenderReport
    train: TokenStatistics
    evaluation: TokenStatistics
    over_row: int = 0
    ledger: Ledger | None = None
    whole: Ledger | None = None

    def lines(self) -> list[str]:
        """The report as lines for the user; lines about losses appear only where there are some."""
        own = {
            "contexts shortened to fit": self._both("context_cut"),
            "answers shortened to fit": self._both("answer_cut"),
            "records dropped because no token of the answer fits": self._both("lost"),
            "training examples left out because their user's row is full": self.over_row,
        }
        return [
            f"training: {self.train}",
            f"evaluation: {self.evaluation}",
            *losses(self.mapping, self.over_limit, self.ledger),
            *counted(own),
            *(self.ledger.lines() if self.ledger else ()),
            *missing(self.mapping),
        ]

    def _both(self, name: str) -> int:
        return sum(getattr(r, name) for r in (self.train_rendering, self.evaluation_rendering))


def losses(mapping: MappingReport, over_limit: int, ledger: Ledger | None) -> list[str]:
    """Rows lost before the split, as lines; a ledger has them in its own words."""
    if ledger:
        return []
    return counted(
        {
            "rows dropped because the answer is empty": mapping.empty_answers,
            "rows dropped because the prompt is empty": mapping.empty_prompts,
            "records left out by limit": over_limit,
        }
    )


def counted(losses: dict[str, int]) -> list[str]:
    """A line for each loss of something."""
    return [f"{count} {what}" for what, count in losses.items() if count]


def missing(mapping: MappingReport) -> list[str]:
    """A line for each column that rows were without."""
    return [f"{count} rows without {column!r}" for column, count in mapping.missing.items()]
