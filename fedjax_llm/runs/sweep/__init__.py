"""Sweeps: a grid of changes to a run file, each cell run and measured in its own process."""

from fedjax_llm.runs.sweep.file import Axis as Axis
from fedjax_llm.runs.sweep.file import SweepFile as SweepFile
from fedjax_llm.runs.sweep.file import load as load
from fedjax_llm.runs.sweep.running import Outcome as Outcome
from fedjax_llm.runs.sweep.running import run as run

__all__ = ["Axis", "Outcome", "SweepFile", "load", "run"]
