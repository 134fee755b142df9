"""The run file: one typed TOML file says everything a run does.

It is parsed once, here, into frozen objects; nothing below this floor reads TOML. Every mistake
becomes one line that names the file, the line, the key and the cure.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path

import tomli_w
from pydantic import ValidationError

from fedjax_llm.errors import UserError
from fedjax_llm.runs.runfile import checks
from fedjax_llm.runs.runfile.errors import Where, explained, syntax_error
from fedjax_llm.runs.runfile.overrides import apply_override
from fedjax_llm.runs.runfile.paths import with_absolute_paths
from fedjax_llm.runs.sections import toml_errors
from fedjax_llm.runs.sections.schema import RunFile


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """Reads a run file, applies `--set` overrides and checks everything that can be checked early.

    Args:
      path: the TOML file. Relative data and model paths in it (and in overrides) are taken from
        its folder and come out absolute, so that the result can be written anywhere.
      overrides: `key.path=VALUE` each; the value is TOML, a bare word is a string;
        `clouds.0.link.up_mbps` and `clouds.medical.link.up_mbps` both address one of the clouds.

    Raises:
      UserError: no such file, not TOML, unknown key, wrong type or value, missing data.
      Refused: the settings would let one party decrypt another's update.
    """
    path = Path(path)
    try:
        source = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the run file {path}: {reason}") from None
    try:
        data = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise UserError(syntax_error(path, source, str(error))) from None
    lines = toml_errors.key_lines(source)
    origin: dict[toml_errors.Path, str] = {}
    for override in overrides:
        origin[apply_override(data, override)] = f"--set {override}"
    where = Where(path, lines, origin)
    try:
        run_file = RunFile.model_validate(data)
    except ValidationError as error:
        raise explained(error, data, where, RunFile) from None
    checks.check_rule(run_file, data, where)
    run_file = with_absolute_paths(run_file, path.resolve().parent, data, where)
    checks.check_profiles(run_file, where)
    checks.check_harmonise(run_file, where)
    return run_file


def to_toml(run_file: RunFile) -> str:
    """The resolved run file, every default written out; `load` gives an equal object back."""
    return tomli_w.dumps(run_file.model_dump(exclude_none=True))
