"""The scalars of metrics.jsonl as TensorBoard event files.

metrics.jsonl is the truth and the event files are a copy: opening the folder writes them anew from
the rounds that are recorded, so that a resumed run neither repeats a step nor keeps a torn file.
What was not measured is no point of a curve: values that are not finite stay out.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedjax_llm.runs.folder import disk
from fedjax_llm.runs.folder.metrics import RoundRecord


class TensorBoard:
    """Writes the scalars of each round; flushed after each.

    Args:
      folder: the folder of event files, replaced as a whole.
      records: the rounds recorded so far.
    """

    def __init__(self, folder: Path, records: Sequence[RoundRecord] = ()) -> None:
        from tensorboardX import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        with disk.full_disk_is_a_user_error(folder):
            self._writer: Any = SummaryWriter(logdir=str(folder), write_to_disk=True)
            for record in records:
                self._add(record)
            self._writer.flush()

    def add(self, record: RoundRecord) -> None:
        """Adds one round."""
        self._add(record)
        self._writer.flush()

    def close(self) -> None:
        """Ends the writer's thread."""
        self._writer.close()

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()

    def _add(self, record: RoundRecord) -> None:
        for tag, value in _scalars(record):
            self._writer.add_scalar(tag, value, record["round"])


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if key == "clouds":
            for name, cloud in value.items():
                yield from _scalars(cloud, f"{name}/")
        elif isinstance(value, int | float) and math.isfinite(value) and key != "round":
            group = "seconds/" if key.startswith("seconds_") else "run/"
            yield f"{prefix or group}{key}", float(value)
