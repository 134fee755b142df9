"""opened.json: what a round opens, recorded before it does.

A client's message of a round is the same however often the round is run, also by another process
with other keys, and so is its noise. Two totals of one round over different clouds would therefore
differ by a client's message. Two over the same clouds of integers that differ, because other
devices, groups or programs round in another way, would differ by something that no noise covers. So
a round that began to open sums is run again with these very integers, or not at all.
"""

import json
from typing import Any

from fedjax_llm.errors import Refused
from fedjax_llm.federation import ToOpen
from fedjax_llm.runs.folder.run_folder import RunFolder


def record(folder: RunFolder, what: ToOpen, clients_at_once: int) -> None:
    """Writes down, durably, that a round is about to open a sum.

    All rounds are kept: a damaged checkpoint takes a run back by more than one.

    Args:
        folder: of the run.
        what: is opened.
        clients_at_once: with which the integers were found.

    Raises:
        Refused: the round began to open other sums before, or the record is damaged.
    """
    rounds = _read(folder)
    own = rounds.setdefault(
        str(what.round),
        {"clouds": list(what.clouds), "clients_at_once": clients_at_once, "sums": {}},
    )
    if sorted(own["clouds"]) != sorted(what.clouds):
        raise Refused(
            f"round {what.round} began to open the sum of {', '.join(own['clouds'])} and is now "
            f"asked for that of {', '.join(what.clouds)}: the two would tell a single update; "
            "bring the same clouds online"
        )
    before = own["sums"].setdefault(str(what.sum), what.digest)
    if before != what.digest:
        raise Refused(
            f"round {what.round} began to open a sum of integers that come out otherwise now, "
            f"with {clients_at_once} clients at once on these devices; two such sums tell more "
            f"than their noise allows: run it as before ({own['clients_at_once']} clients at once, "
            "the same devices, microbatch, remat, unroll and versions), or start a new run"
        )
    folder.write(folder.opened.name, json.dumps(rounds) + "\n")


def clients_at_once(folder: RunFolder, number: int) -> int | None:
    """With how many at once a round was run when it began to open sums; None if it did not.

    Raises:
        Refused: the record is damaged.
    """
    found: int | None = _read(folder).get(str(number), {}).get("clients_at_once")
    return found


def _read(folder: RunFolder) -> dict[str, dict[str, Any]]:
    path = folder.opened
    if not path.exists():
        return {}
    try:
        return {
            str(int(number)): {
                "clouds": [str(name) for name in own["clouds"]],
                "clients_at_once": int(own["clients_at_once"]),
                "sums": {str(int(place)): str(digest) for place, digest in own["sums"].items()},
            }
            for number, own in json.loads(path.read_bytes()).items()
        }
    except (ValueError, AttributeError, TypeError, KeyError):
        raise Refused(
            f"{path} is damaged: nobody can tell whose sums were opened; start a new run"
        ) from None
