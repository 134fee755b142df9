"""Runs: the typed run file, the run folder with its metrics and checkpoints, and the report.

Its rooms, each importing only from those above it:

| room                            | what                                                         |
|---------------------------------|--------------------------------------------------------------|
| `sections`, `processes`         | the typed run file; several processes as one run             |
| `folder`, then `events`         | what lies on disk; what a running job tells                  |
| `build`                         | from sections to the objects of the federation               |
| `runfile`                       | a run file read, and checked against all that it names       |
| `report`, `preview`, `planning`, `export`, `sweep`, then `job` | what is done with a run file  |

Only what is light to import is re-exported here; the job and the exports bring JAX.
"""

from fedjax_llm.runs.folder import RunFolder as RunFolder
from fedjax_llm.runs.folder.summary import Summary as Summary
from fedjax_llm.runs.runfile import load as load
from fedjax_llm.runs.runfile import to_toml as to_toml
from fedjax_llm.runs.sections.schema import RunFile as RunFile

__all__ = ["RunFile", "RunFolder", "Summary", "load", "to_toml"]
