"""Planning: which rank, local steps, bits and schedule reach a target for the least; see `planner`.

| module | idea |
|---|---|
| `candidates`, `balance` | what there is to choose, by cloud |
| `screen` | what every candidate takes, by simulation alone |
| `pilot`, `curve` | what a few rounds tell of all |
| `effects`, `search` | which candidates get a pilot, and for how long |
| `noise` | more rounds take more noise |
| `forecast`, `table` | the result |
"""

from fedjax_llm.runs.planning.planner import Planned as Planned
from fedjax_llm.runs.planning.planner import make as make

__all__ = ["Planned", "make"]
