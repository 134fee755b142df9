"""Trace files: what a cloud's link or the cloud itself did over time, as a CSV of two columns."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

from fedjax_llm.errors import UserError


def read_steps(
    path: Path, column: str, value_of: Callable[[str], float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Reads a step function of time: each line holds from its second until the next line's.

    Args:
        path: of a CSV file with the header `seconds,COLUMN`; blank lines are skipped.
        column: name of the second column.
        value_of: makes a value of a cell; raises ValueError, with what it must be, if it is none.

    Returns:
        Seconds, which begin at 0 and rise strictly, and the values.

    Raises:
        UserError: the file cannot be read, or a line does not fit; file and line are named.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the trace {path}: {reason}") from None
    seconds: list[float] = []
    values: list[float] = []
    header = ["seconds", column]
    rows = csv.reader(text.splitlines())
    for row in rows:
        where = f"{path}:{rows.line_num}"
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if header:
            if cells != header:
                raise UserError(
                    f"{where}: the first line must be {','.join(header)}, got {','.join(cells)}"
                )
            header = []
            continue
        if len(cells) != 2:
            raise UserError(f"{where}: a line must have two cells, got {len(cells)}")
        seconds.append(_time(cells[0], seconds, where))
        try:
            values.append(value_of(cells[1]))
        except ValueError as error:
            raise UserError(f"{where}: {column} must be {error}, got {cells[1]!r}") from None
    if not seconds:
        raise UserError(f"{path}: the trace is empty; write seconds,{column} and one line for each")
    return tuple(seconds), tuple(values)


def _time(cell: str, before: list[float], where: str) -> float:
    try:
        time = float(cell)
    except ValueError:
        time = math.nan
    if not math.isfinite(time):
        raise UserError(f"{where}: seconds must be a finite number, got {cell!r}")
    if not before and time != 0:
        raise UserError(f"{where}: seconds must begin at 0, got {cell}; add a line for 0")
    if before and time <= before[-1]:
        raise UserError(
            f"{where}: seconds must rise, got {cell} after {before[-1]:g}; sort the lines by time"
        )
    return time
