"""The job: the rounds of a run file, run by the first process and followed by the others."""

from fedjax_llm.runs.job.running import resume as resume
from fedjax_llm.runs.job.running import run as run

__all__ = ["resume", "run"]
