"""What a run leaves on disk: its folder, and one module for each kind of file in it."""

from fedjax_llm.runs.folder.run_folder import RunFolder as RunFolder

__all__ = ["RunFolder"]
