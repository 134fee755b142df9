"""Ways to combine messages that hold against malicious clients.

Each sees every client's message, or, inside `GroupRobust`, the secure sum of every group. A new
one is a module and a line in `COMBINES`.
"""

from collections.abc import Callable

from fedjax_llm.aggregation.robust.centred_clipping import CentredClipping as CentredClipping
from fedjax_llm.aggregation.robust.combine import Combine as Combine
from fedjax_llm.aggregation.robust.geometric_median import GeometricMedian as GeometricMedian
from fedjax_llm.aggregation.robust.groups import GroupRobust as GroupRobust
from fedjax_llm.aggregation.robust.groups import assign as assign
from fedjax_llm.aggregation.robust.krum import Krum as Krum
from fedjax_llm.aggregation.robust.krum import MultiKrum as MultiKrum
from fedjax_llm.aggregation.robust.median import CoordinateMedian as CoordinateMedian
from fedjax_llm.aggregation.robust.median import TrimmedMean as TrimmedMean

# (byzantine, radius) -> Combine: the assumed number of malicious clients, and the l2 radius of
# centred clipping in the unit of the messages. Each builder ignores what it has no use for.
Builder = Callable[[int, float], Combine]

COMBINES: dict[str, Builder] = {
    "krum": lambda byzantine, radius: Krum(byzantine),
    "multi-krum": lambda byzantine, radius: MultiKrum(byzantine),
    "median": lambda byzantine, radius: CoordinateMedian(),
    "trimmed-mean": lambda byzantine, radius: TrimmedMean(byzantine),
    "geometric-median": lambda byzantine, radius: GeometricMedian(),
    "centred-clipping": lambda byzantine, radius: CentredClipping(radius),
}

__all__ = [
    "COMBINES",
    "Builder",
    "CentredClipping",
    "Combine",
    "CoordinateMedian",
    "GeometricMedian",
    "GroupRobust",
    "Krum",
    "MultiKrum",
    "TrimmedMean",
    "assign",
]
