"""audit.json: what an audit of the run found, for the report, which does not wait for JAX."""

import json
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder.run_folder import RunFolder

NAME = "audit.json"


def write(folder: RunFolder, found: dict[str, Any]) -> None:
    """Replaces the file."""
    folder.write(NAME, json.dumps(found, indent=2) + "\n")


def read(folder: RunFolder) -> dict[str, Any] | None:
    """As it was written; None if the run has not been audited.

    Raises:
      UserError: it is damaged.
    """
    file = folder.path / NAME
    if not file.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        float(found["report"]["lower_bound"]), float(found["report"]["upper_bound"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}); make it again with `fedjax-llm audit`"
        ) from None
    return found
