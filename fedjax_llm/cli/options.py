"""Arguments that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as privacy.clip_norm=0.5."),
]
RunFolderPath = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")]
