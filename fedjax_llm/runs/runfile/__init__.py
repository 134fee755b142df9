"""The run file: read once, checked against all that it names, and written out again.

Light to import; what `load` checks with brings JAX when it is called.
"""

from fedjax_llm.runs.runfile.reading import load as load
from fedjax_llm.runs.runfile.reading import to_toml as to_toml
from fedjax_llm.runs.sections.clouds import Link as Link
from fedjax_llm.runs.sections.schema import RunFile as RunFile

__all__ = ["Link", "RunFile", "load", "to_toml"]
