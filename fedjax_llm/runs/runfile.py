"""The run file: one typed TOML file says everything a run does.

It is parsed once, here, into frozen objects; nothing below this floor reads TOML. Every mistake
becomes one line that names the file, the line, the key and the cure.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

import tomli_w
from pydantic import ValidationError

from fedjax_llm.errors import FedJaxError, Refused, UserError
from fedjax_llm.runs import toml_errors
from fedjax_llm.runs.runfile_aggregation import CombineName
from fedjax_llm.runs.runfile_clouds import TRACES
from fedjax_llm.runs.runfile_errors import Where, explained, syntax_error
from fedjax_llm.runs.runfile_harmonise import CloudHarmoniseSection, HarmoniseSection
from fedjax_llm.runs.runfile_overrides import apply_override
from fedjax_llm.runs.runfile_schema import Link as Link
from fedjax_llm.runs.runfile_schema import RunFile as RunFile
from fedjax_llm.runs.runfile_secure import private_source
from fedjax_llm.runs.runfile_types import BUILTIN_PREFIX


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
    _check_rule(run_file, data, where)
    run_file = _with_absolute_paths(run_file, path.resolve().parent, data, where)
    _check_profiles(run_file, where)
    _check_harmonise(run_file, where)
    return run_file


def to_toml(run_file: RunFile) -> str:
    """The resolved run file, every default written out; `load` gives an equal object back."""
    return tomli_w.dumps(run_file.model_dump(exclude_none=True))


def _check_rule(run_file: RunFile, data: dict[str, Any], where: Where) -> None:
    """The rule exists, and goes together with everything else that is asked for."""
    # Imported here: it brings JAX, which those who only want the classes need not wait for.
    from fedjax_llm.aggregation import RULES
    from fedjax_llm.runs import together

    key: toml_errors.Path = ("aggregation", "rule")
    name, sum_name = run_file.aggregation.rule, run_file.secure.sum
    if name in get_args(CombineName):
        raise UserError(
            f"{where(key)}: [aggregation] rule says what is trained, and {toml_errors.shown(name)} "
            f'combines messages; write combine = {toml_errors.shown(name)} beside rule = "ffa"'
        )
    if name not in RULES:
        guess = toml_errors.nearest(name, RULES)
        hint = f"; did you mean {toml_errors.shown(guess)}?" if guess else ""
        valid = ", ".join(toml_errors.shown(rule) for rule in RULES)
        got = toml_errors.shown(name)
        raise UserError(f"{where(key)}: [aggregation] rule must be one of {valid}, got {got}{hint}")
    if sum_name != "plain" and RULES[name].needs_individual_messages:
        raise Refused(
            f'{where(key)}: [aggregation] rule "{name}" has to read the message of each cloud, '
            f'which [secure] sum = "{sum_name}" hides; choose another rule or sum = "plain"'
        )
    for index, cloud in enumerate(run_file.clouds):
        if cloud.rank not in (None, run_file.adapter.rank) and not RULES[name].facts.ranks:
            place = ("clouds", index, "rank")
            raise UserError(
                f'{where(place)}: rule "{name}" takes one rank for all clouds; leave '
                f"{toml_errors.key_name(place, data)} out, or choose a rule with ranks in "
                "`fedjax-llm rules`"
            )
    try:
        together.check_together(run_file)
    except FedJaxError as error:
        raise type(error)(f"{where(('aggregation',))}: {error}") from None


def _check_profiles(run_file: RunFile, where: Where) -> None:
    """The profiles of all clouds can be made: traces, names of the catalogue, its file."""
    from fedjax_llm.runs import cloud_profiles  # as above, and it reads the catalogue

    try:
        figures = cloud_profiles.catalogue(run_file)
    except UserError as error:
        raise UserError(f"{where(('catalogue',))}: {error}") from None
    for index, cloud in enumerate(run_file.clouds):
        try:
            cloud_profiles.profile(cloud, run_file, figures)
        except UserError as error:
            name = toml_errors.shown(cloud.name)
            raise UserError(f"{where(('clouds', index))}: cloud {name}: {error}") from None


def _check_harmonise(run_file: RunFile, where: Where) -> None:
    """Labels, lengths and mixtures of all clouds can be made."""
    from fedjax_llm.runs import harmonising  # as above

    try:
        harmonising.settings(run_file)
    except UserError as error:
        raise UserError(f"{where(('harmonise',))}: {error}") from None


def _with_absolute_paths(
    run_file: RunFile, folder: Path, data: dict[str, Any], where: Where
) -> RunFile:
    def existing(text: str, key: toml_errors.Path) -> str:
        absolute = (folder / Path(text).expanduser()).resolve()
        if not absolute.exists():
            name = toml_errors.key_name(key, data)
            raise UserError(f"{where(key)}: {name}: there is no {absolute}")
        return str(absolute)

    def absolute(sources: tuple[str, ...], key: toml_errors.Path) -> tuple[str, ...]:
        return tuple(
            source if source.startswith(BUILTIN_PREFIX) else existing(source, (*key, position))
            for position, source in enumerate(sources)
        )

    def with_labels[S: CloudHarmoniseSection | HarmoniseSection | None](
        section: S, key: toml_errors.Path
    ) -> S:
        if section is None or section.labels_file is None:
            return section
        update = {"labels_file": existing(section.labels_file, key)}
        return cast(S, section.model_copy(update=update))

    model = run_file.model
    if model.path is not None:
        model = model.model_copy(update={"path": existing(model.path, ("model", "path"))})
    catalogue = run_file.catalogue and existing(run_file.catalogue, ("catalogue",))
    clouds = []
    for index, cloud in enumerate(run_file.clouds):
        changes: dict[str, Any] = {}
        if cloud.data is not None:
            sources = absolute(cloud.data.sources, ("clouds", index, "data", "sources"))
            changes["data"] = cloud.data.model_copy(update={"sources": sources})
        for section, trace in TRACES:
            own = changes.get(section, getattr(cloud, section))
            if (text := getattr(own, trace, None)) is not None:
                file = existing(text, ("clouds", index, section, trace))
                changes[section] = own.model_copy(update={trace: file})
        labels = ("clouds", index, "harmonise", "labels_file")
        changes["harmonise"] = with_labels(cloud.harmonise, labels)
        clouds.append(cloud.model_copy(update=changes))
    partition = run_file.partition
    if partition is not None:
        sources = absolute(partition.sources, ("partition", "sources"))
        partition = partition.model_copy(update={"sources": sources})
    secure = run_file.secure
    selective = secure.selective
    if selective is not None:
        key = ("secure", "selective")
        if selective.map is not None:
            changed: dict[str, Any] = {"map": existing(selective.map, (*key, "map"))}
        else:
            public = selective.measure_on
            changed = {"measure_on": public and absolute(public, (*key, "measure_on"))}
        selective = selective.model_copy(update=changed)
        secure = secure.model_copy(update={"selective": selective})
        private = {
            cloud.name: read.sources
            for cloud in clouds
            if (read := cloud.data or partition) is not None
        }
        if (found := private_source(selective, private)) is not None:
            index, name = found
            place = (*key, "measure_on", index)
            raise Refused(
                f"{where(place)}: {toml_errors.key_name(place, data)} must be public text, and "
                f"cloud {toml_errors.shown(name)} trains on it: a map from private data betrays it"
            )
    update = {"model": model, "secure": secure, "clouds": tuple(clouds), "catalogue": catalogue}
    update["partition"] = partition
    update["harmonise"] = with_labels(run_file.harmonise, ("harmonise", "labels_file"))
    return run_file.model_copy(update=update)
