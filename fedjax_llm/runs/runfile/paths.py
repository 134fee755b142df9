"""The files that a run file names: there, and by absolute paths from then on."""

from pathlib import Path
from typing import Any, cast

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.runs.runfile.errors import Where
from fedjax_llm.runs.sections import toml_errors
from fedjax_llm.runs.sections.clouds import TRACES
from fedjax_llm.runs.sections.harmonise import CloudHarmoniseSection, HarmoniseSection
from fedjax_llm.runs.sections.schema import RunFile
from fedjax_llm.runs.sections.secure import private_source
from fedjax_llm.runs.sections.types import BUILTIN_PREFIX


def with_absolute_paths(
    run_file: RunFile, folder: Path, data: dict[str, Any], where: Where
) -> RunFile:
    """The run file with all its paths absolute.

    Args:
      run_file: as it was read.
      folder: from which relative paths are taken.
      data: the run file as TOML has it, for the names of keys.
      where: says where a key was set.

    Raises:
      UserError: a path leads nowhere.
      Refused: a map for [secure.selective] is to be measured on what a cloud trains on.
    """

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
