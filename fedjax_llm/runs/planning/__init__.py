"""Planning: which rank, local steps, bits and schedule reach a target for the least; see `planner`.

| module | idea |
|---|---|
| `candidates`, `balance` | what there is to choose, by cloud |
| `screen` | what every candidate takes, by simulation alone |
| `pilot`, `curve` | what a few rounds tell of all |
| `effects`, `search` | which candidates get a pilot, and for how long |
| `noise` | more rounds take more noise |
| `forecast`, `table` | the result |

With a privacy unit the epsilon of a plan is that of the run that it chooses. Losses of the pilots'
rounds, and so the choice itself, are not covered by it: see `pilot`.
"""

from fedjax_llm.runs.planning.planner import Planned as Planned
from fedjax_llm.runs.planning.planner import make as make

__all__ = ["Planned", "make"]
