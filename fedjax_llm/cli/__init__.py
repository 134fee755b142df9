"""The command line: parses, calls, prints. All work is done by the packages below.

Exit codes: 0 done; 2 a user's mistake; 3 refused for privacy or security; 4 another process of the
same run is gone; 130 interrupted; 1 a defect of this package, the only case that shows a traceback.
"""

from fedjax_llm.cli.entry import main as main

__all__ = ["main"]
