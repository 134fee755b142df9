"""harmonise.json: what was changed in the data of each cloud, in the folder of the run."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder.run_folder import RunFolder

Steps = Sequence[Mapping[str, Any]]


def write(folder: RunFolder, clouds: Mapping[str, Steps], whole: Steps | None = None) -> None:
    """Writes the steps of each cloud.

    Args:
      folder: of the run.
      clouds: for each cloud its steps, as `Ledger.to_json` gives them.
      whole: the steps of the corpus that was divided among the clouds; None where each has its own.
    """
    content = {"whole": whole, "clouds": clouds}
    folder.write(folder.harmonised.name, json.dumps(content, indent=1) + "\n")


def read(folder: RunFolder) -> dict[str, Any] | None:
    """What `write` wrote; None where the run does not harmonise.

    Raises:
      UserError: the file is damaged, or its counts do not add up.
    """
    if not folder.harmonised.exists():
        return None
    try:
        content = json.loads(folder.harmonised.read_bytes())
        for steps in (content["whole"] or [], *content["clouds"].values()):
            for step in steps:
                gone = sum(step["dropped"].values())
                if step["rows_out"] != step["rows_in"] - gone + step["added"]:
                    raise ValueError(step["name"])
        return {"whole": content["whole"], "clouds": content["clouds"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder.harmonised} is damaged or of another version; resume the run to write it "
            "again"
        ) from None
