"""The whole command of four rounds, from the start of the process to its end: ours and Flower's.

Ours with an empty compilation cache and with one that has been filled. Every way to run a side is
tried as a whole: what compiles longer to be faster loses where rounds are few.
"""

import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace

from contests import FLOWER, OURS, Way
from sides import Side, folder_of, ratio, spread
from table import Row, row

COMMAND_ROUNDS = 4


def command(turns: int) -> list[Row]:
    """Cold, warm and Flower in turn, a third as often as there are turns, once at least."""
    folder = folder_of("decoder")
    with ExitStack() as folders:

        def empty() -> str:
            return folders.enter_context(tempfile.TemporaryDirectory(prefix="fedjax-llm-peers-"))

        def whole(name: str, way: Way, cache: str | None = None) -> Side:
            if cache is not None:
                cached = (
                    ("JAX_COMPILATION_CACHE_DIR", cache),
                    ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1"),
                )
                way = replace(way, environment=way.environment + cached)
            with way.side("decoder", folder, COMMAND_ROUNDS, wait=False) as side:
                side.finish()
            told = f"{name}: {way.words}, decoder: {side.seconds_whole:.3g} s"
            print(told, file=sys.stderr, flush=True)
            return side

        # The first run of a way finds its cache empty, the second full.
        caches = {way: empty() for way in OURS}
        tried = {
            name: {way: whole(f"tried {name}", way, caches.get(way)) for way in ways}
            for name, ways in {"cold": OURS, "warm": OURS, "flower": FLOWER}.items()
        }
        best = {
            name: min(sides, key=lambda way, sides=sides: sides[way].seconds_whole)
            for name, sides in tried.items()
        }
        runs: dict[str, list[Side]] = {name: [] for name in best}
        for _ in range(max(1, turns // 3)):
            for name, way in best.items():
                cache = empty() if name == "cold" else caches.get(way)
                runs[name].append(whole(name, way, cache))
    return rows_of(runs)


def rows_of(runs: dict[str, list[Side]]) -> list[Row]:
    """What whole commands came to, by "cold", "warm" and "flower"."""
    seconds = {name: [side.seconds_whole for side in sides] for name, sides in runs.items()}
    ready = {
        name: [
            side.seconds_whole - len(side.rounds) * statistics.median(side.steady(1))
            for side in sides
        ]
        for name, sides in runs.items()
    }
    rows = []
    for name, took in seconds.items():
        start = f"command: {name},"
        rows += [
            row(f"{start} {COMMAND_ROUNDS} rounds", statistics.median(took), "s"),
            row(f"{start} spread", spread(took), ""),
            row(f"{start} beside steady rounds", statistics.median(ready[name]), "s"),
        ]
    for name, bar in (("warm", 5.0), ("cold", 3.0)):
        times = ratio(seconds["flower"], seconds[name])
        rows.append(row(f"command: ours ({name}) against flower", times, "x", bar, least=True))
    return rows
