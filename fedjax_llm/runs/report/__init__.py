"""How a run is shown: on one page, in the terminal while it runs, beside other runs."""

from fedjax_llm.runs.report.page import render as render
from fedjax_llm.runs.report.page import write as write

__all__ = ["render", "write"]
