"""A contest: sides that train the same task in turns, and the rows that come of it.

A peer may be run in several ways, such as with one thread or two. Each way is tried for some rounds
by itself, and the one that was fastest then takes part; so nobody is measured in a bad setting.
"""

import functools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sides import Side, folder_of, in_turns, ratio, spread
from table import Row, row
from tasks import distance, read_factors

# Losses of the same steps may differ by it.
SAME_LOSS = 1e-3
# Threads of PyTorch that wait for each other sleep: where anybody else uses a core, those that spin
# were up to twenty times slower.
SLEEPING = (("OMP_WAIT_POLICY", "PASSIVE"),)


@dataclass(frozen=True)
class Way:
    """How to run a side.

    Attributes:
        peer: its environment.
        script: in this folder.
        options: arguments of the script.
        environment: changes of it.
    """

    peer: str
    script: str
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def words(self) -> str:
        """What to call it."""
        return " ".join((self.peer, *self.options, *(f"{k}={v}" for k, v in self.environment)))

    def side(self, task: str, folder: Path, rounds: int, wait: bool = True) -> Side:
        """Starts it."""
        return Side(
            self.peer,
            self.script,
            task,
            folder,
            rounds=rounds,
            wait=wait,
            options=self.options,
            environment=dict(self.environment),
        )


def our_way(script: str, options: Sequence[str], devices: int) -> Way:
    """With all cores as one device, or as two of a thread each."""
    return Way("ours", script, tuple(options), (("JAX_NUM_CPU_DEVICES", str(devices)),))


# One layer of the model after the other, or six of them compiled in a row.
OURS = tuple(
    our_way("ours.py", ("--unroll", str(layers)), devices)
    for devices in (1, 2)
    for layers in (1, 6)
)
# Clients one by one, or in batches of several.
OURS_DENSE = tuple(
    our_way("ours_dense.py", ("--at-once", str(clients)), devices)
    for devices, clients in ((1, 1), (1, 2), (1, 5), (2, 1), (2, 5))
)


def torch_ways(peer: str, script: str) -> tuple[Way, ...]:
    """With one thread a model, and with two."""
    return tuple(Way(peer, script, ("--threads", str(n)), SLEEPING) for n in (1, 2))


PLAIN = torch_ways("plain", "plain_loop.py")
# One thread: two workers at once. Two threads: one worker.
FLOWER = torch_ways("flower", "flower_simulation.py")
PFL = torch_ways("pfl", "pfl_simulation.py")
FEDJAX = (
    Way("fedjax", "fedjax_emnist.py", ("--backend", "jit"), (("FEDJAX_DEVICES", "1"),)),
    Way("fedjax", "fedjax_emnist.py", ("--backend", "pmap"), (("FEDJAX_DEVICES", "2"),)),
)


@functools.cache
def _trial(way: Way, task: str, folder: Path, rounds: int) -> float:
    try:
        with way.side(task, folder, rounds, wait=False) as side:
            seconds = min(side.finish().steady(1))
    except RuntimeError as error:
        # A way that a machine cannot go, such as a compiler that is not there, is not the fastest.
        print(f"tried: {way.words}, {task}: {error}", file=sys.stderr, flush=True)
        return math.inf
    print(f"tried: {way.words}, {task}: {seconds:.3g} s a round", file=sys.stderr, flush=True)
    return seconds


def fastest(ways: Sequence[Way], task: str, folder: Path, rounds: int = 3) -> Way:
    """The way whose best round after the first was the fastest; each is tried once a command.

    Raises:
        RuntimeError: none of several could be gone; standard error has the reasons.
    """
    if len(ways) == 1:
        return ways[0]
    best = min(ways, key=lambda way: _trial(way, task, folder, rounds))
    if math.isinf(_trial(best, task, folder, rounds)):
        raise RuntimeError(f"{task}: no way to run {best.peer} worked, see the reasons above")
    return best


@dataclass(frozen=True)
class Contest:
    """Who meets in which task.

    Attributes:
        task: by name.
        ours: the ways to run ours.
        peers: by the name in the rows, the ways to run it.
        bars: the least ratio of speeds that is promised, by peer.
        work: what a round does, a number of `unit`.
        unit: such as "tokens".
        prepare: the script that writes the task's files.
        trial: rounds in which a way is tried.
        a_turn: rounds of a turn. Several, where one is over before threads have woken up and caches
            are filled after the turns of others.
        alike: whether all sides take the rows in one order, so that their losses can be compared.
        same_loss: nats by which losses of the same steps may differ.
    """

    task: str
    ours: tuple[Way, ...]
    peers: dict[str, tuple[Way, ...]]
    bars: dict[str, float]
    work: float
    unit: str
    prepare: str = "prepare.py"
    trial: int = 3
    a_turn: int = 1
    alike: bool = True
    same_loss: float = SAME_LOSS

    def rows(self, turns: int, warm: int = 1) -> list[Row]:
        """Trains `warm` rounds of each side that do not count and `turns` turns that do."""
        rounds = [1] * warm + [self.a_turn] * turns
        folder = folder_of(self.task, self.prepare)
        chosen = {
            name: fastest(ways, self.task, folder, self.trial)
            for name, ways in {"ours": self.ours, **self.peers}.items()
        }
        with ExitStack() as open_sides:
            sides = {
                name: open_sides.enter_context(way.side(self.task, folder, sum(rounds)))
                for name, way in chosen.items()
            }
            in_turns(list(sides.values()), rounds)
            rows = [found for name, side in sides.items() for found in self.own(name, side, warm)]
            for peer, least in self.bars.items():
                times = ratio(sides[peer].steady(warm), sides["ours"].steady(warm))
                rows.append(row(f"{self.task}: ours against {peer}", times, "x", least, least=True))
            for peer in self.peers if self.alike else ():
                rows += self.same(sides["ours"], sides[peer], peer, folder)
            return rows

    def same(self, ours: Side, theirs: Side, peer: str, folder: Path) -> list[Row]:
        """Whether both did the same arithmetic."""
        losses = [np.array([done["loss"] for done in side.rounds]) for side in (ours, theirs)]
        # As an array's maximum, NaN stays NaN, and compares as missed.
        apart = float(np.max(np.abs(losses[0] - losses[1])))
        far = distance(ours.trained(), theirs.trained(), read_factors(folder / "start.npz"))
        start = f"{self.task}: {peer},"
        return [
            row(f"{start} largest difference of losses", apart, "nats", self.same_loss),
            row(f"{start} fall of the loss meanwhile", float(losses[1][0] - losses[1][-1]), "nats"),
            row(f"{start} distance of what is trained, over its way", far, ""),
        ]

    def own(self, name: str, side: Side, warm: int) -> list[Row]:
        """What a side came to by itself."""
        seconds, start = side.steady(warm), f"{self.task}: {name},"
        if not all(math.isfinite(figure) for figure in seconds):
            raise RuntimeError(f"{side.name} told seconds that are no numbers")
        processor = statistics.median(done["processor"] for done in side.rounds[warm:])
        settings = " ".join(str(word) for word in self._settings(side))
        middle = statistics.median(seconds)
        return [
            row(f"{start} a round ({settings})", middle, "s"),
            row(f"{start} spread of rounds", spread(seconds), ""),
            row(f"{start} processor time of its process", processor, "s"),
            row(f"{start} speed", self.work / middle, f"{self.unit}/s"),
            row(f"{start} first round above a steady one", side.rounds[0]["seconds"] - middle, "s"),
        ]

    def _settings(self, side: Side) -> list[str]:
        return [
            f"{key} {side.head[key]}"
            for key in ("threads", "backend", "devices")
            if key in side.head
        ]


def check_only(
    task: str, ours: Way, peer: str, theirs: Way, prepare: str, rounds: int
) -> list[Row]:
    """The rows that compare losses, of a task that is not timed."""
    folder = folder_of(task, prepare)
    contest = Contest(task, (ours,), {peer: (theirs,)}, {}, 1.0, "", prepare)
    with (
        ours.side(task, folder, rounds, wait=False) as own,
        theirs.side(task, folder, rounds, wait=False) as other,
    ):
        return contest.same(own.finish(), other.finish(), peer, folder)


Part = Callable[[int], list[Row]]
