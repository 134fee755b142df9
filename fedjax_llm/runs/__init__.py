"""Runs: the typed run file, the run folder with its metrics and checkpoints, and the report.

Only what is light to import is re-exported here; the job and the exports bring JAX.
"""

from fedjax_llm.runs.folder import RunFolder as RunFolder
from fedjax_llm.runs.runfile import RunFile as RunFile
from fedjax_llm.runs.runfile import load as load
from fedjax_llm.runs.runfile import to_toml as to_toml
from fedjax_llm.runs.summary import Summary as Summary

__all__ = ["RunFile", "RunFolder", "Summary", "load", "to_toml"]
