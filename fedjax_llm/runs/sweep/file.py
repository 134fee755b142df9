"""The sweep file: a run file, what changes in it from cell to cell, and what is drawn of it."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from fedjax_llm.errors import UserError
from fedjax_llm.runs.runfile.errors import Where, explained, syntax_error
from fedjax_llm.runs.sections import toml_errors
from fedjax_llm.runs.sections.problem import problem
from fedjax_llm.runs.sections.types import Positive, Section, Text

# Names of axes that say how a cell is started, instead of a key of the run file.
MACHINE = ("devices", "processes")
Value = bool | int | float | str
Values = Annotated[tuple[Value, ...], Field(strict=False, min_length=1)]


class Axis(Section):
    """[[axis]]: one direction of the grid.

    `name` heads its column. `keys` are those of the run file that take each value, as `--set` has
    them: `name` itself if left out. `also` has further keys with values of their own, one for each
    of `values`: what has to grow along. An axis called "devices" starts each cell with so many fake
    CPU devices, one called "processes" in so many processes; either has no keys unless they are
    given.
    """

    name: Text
    values: Values
    keys: Annotated[tuple[Text, ...], Field(strict=False)] | None = None
    also: dict[str, Values] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key, values in self.also.items():
            if len(values) != len(self.values):
                raise problem(
                    ("also",),
                    f"must give {key} as many values as the axis has, {len(self.values)}, and has "
                    f"{len(values)}",
                    got=False,
                )
        if len(set(self.values)) != len(self.values):
            raise problem(("values",), "must differ from each other; remove what is repeated")
        counts = [value for value in self.values if type(value) is int and value >= 1]
        if self.name in MACHINE and len(counts) != len(self.values):
            raise problem(("values",), f"must be numbers of {self.name}, each at least 1")
        return self

    def changes(self, index: int) -> tuple[tuple[str, Value], ...]:
        """Keys of the run file and what the value at a place sets them to."""
        keys = self.keys if self.keys is not None else () if self.name in MACHINE else (self.name,)
        return (
            *((key, self.values[index]) for key in keys),
            *((key, values[index]) for key, values in self.also.items()),
        )


class PlotSection(Section):
    """[plot]: figures over one axis, a line for each combination of the others.

    `scaling` "strong" compares seconds for the same work along `x`, "weak" the work done in a
    second where it grows with `x`; left out, the figures are drawn as they are.
    """

    x: Text
    scaling: Literal["strong", "weak"] | None = None


class SweepFile(Section):
    """A whole sweep.

    `run` is the run file, from the sweep file's folder; `set` changes it in every cell, as `--set`.
    Every combination of the axes is a cell. A cell that takes more than `minutes` is ended and
    reported.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run: Text
    set: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    minutes: Positive = 60.0
    axis: Annotated[tuple[Axis, ...], Field(strict=False, min_length=1)]
    plot: PlotSection | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [axis.name for axis in self.axis]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise problem(("axis", index, "name"), "must be unique among the axes")
        if self.plot is not None:
            if self.plot.x not in names:
                raise problem(("plot", "x"), f"must be the name of an axis, {', '.join(names)}")
            values = self.axis[names.index(self.plot.x)].values
            if any(isinstance(value, bool | str) for value in values):
                raise problem(("plot", "x"), "must be an axis of numbers")
        return self


def load(path: Path) -> SweepFile:
    """Reads a sweep file; `run` comes out absolute.

    Raises:
      UserError: no such file, not TOML, unknown key, wrong type or value, no such run file.
    """
    try:
        source = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the sweep file {path}: {reason}") from None
    try:
        data: dict[str, Any] = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise UserError(syntax_error(path, source, str(error))) from None
    where = Where(path, toml_errors.key_lines(source), {})
    try:
        found = SweepFile.model_validate(data)
    except ValidationError as error:
        raise explained(error, data, where, SweepFile) from None
    run = (path.resolve().parent / Path(found.run).expanduser()).resolve()
    if not run.is_file():
        raise UserError(f"{where(('run',))}: run: there is no {run}; give the path of a run file")
    return found.model_copy(update={"run": str(run)})
