"""opened.json: whose sum a round opens, recorded before it does.

A client's message of a round is the same however often the round is run, also by another process
with other keys. Two totals of one round over different clouds would therefore differ by a client's
message. So a round that began to open sums over some clouds is run again over these, or not at all.
"""

import json
from collections.abc import Sequence

from fedjax_llm.errors import Refused
from fedjax_llm.runs.folder import RunFolder


def record(folder: RunFolder, number: int, clouds: Sequence[str]) -> None:
    """Writes down, durably, that a round is about to open sums over these clouds.

    All rounds are kept: a damaged checkpoint takes a run back by more than one.

    Raises:
        Refused: the round began to open sums over others before, or the record is damaged.
    """
    path, rounds = folder.opened, dict[str, list[str]]()
    if path.exists():
        try:
            found = json.loads(path.read_bytes())
            rounds = {str(int(n)): [str(name) for name in names] for n, names in found.items()}
        except (ValueError, AttributeError, TypeError):
            raise Refused(
                f"{path} is damaged: nobody can tell whose sums were opened; start a new run"
            ) from None
    others = rounds.get(str(number))
    if others is not None and sorted(others) != sorted(clouds):
        raise Refused(
            f"round {number} began to open the sum of {', '.join(others)} and is now asked for "
            f"that of {', '.join(clouds)}: the two would tell a single update; bring the same "
            "clouds online"
        )
    rounds[str(number)] = list(clouds)
    folder.write(path.name, json.dumps(rounds) + "\n")
