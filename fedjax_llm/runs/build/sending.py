"""When messages are sent, how they are shortened, and what hides them."""

from fedjax_llm.clouds.schedules import SCHEDULES, Schedule
from fedjax_llm.compression import CODECS, Chain, Rotated
from fedjax_llm.federation import (
    Bfv,
    Ckks,
    Compression,
    Masked,
    Plain,
    Selective,
    SumMode,
    Threshold,
)
from fedjax_llm.federation.promises import fewest_clouds
from fedjax_llm.models import Model
from fedjax_llm.runs.build import plans
from fedjax_llm.runs.build.combining import rule
from fedjax_llm.runs.build.local import lora
from fedjax_llm.runs.build.rows import mapping
from fedjax_llm.runs.build.selection import selection
from fedjax_llm.runs.sections.schedule import CODEC_KEYS
from fedjax_llm.runs.sections.schema import RunFile


def schedule(run_file: RunFile) -> Schedule:
    """When the server waits for whom."""
    section = run_file.schedule
    names = {"grace_seconds": "grace", "staleness_exponent": "exponent"}
    given = section.model_dump(exclude={"name"}, exclude_none=True)
    settings = {names.get(key, key): value for key, value in given.items()}
    return SCHEDULES[section.name](**settings)


def compression(run_file: RunFile) -> Compression | None:
    """How messages are shortened; None where they are sent whole."""
    section = run_file.compression
    if section is None:
        return None
    keys = {key for key in CODEC_KEYS[section.codec] if getattr(section, key) is not None}
    codec = CODECS[section.codec](**section.model_dump(include=keys))
    if section.rotate:
        codec = Chain((codec, Rotated()))
    return Compression(codec, section.error_feedback, section.rounding, section.broadcast)


_HIDDEN: dict[str, type[Masked | Threshold | Bfv | Ckks]] = {
    "masked": Masked,
    "threshold": Threshold,
    "bfv": Bfv,
    "ckks": Ckks,
}


def fewest_opened(run_file: RunFile) -> int:
    """The fewest clouds whose sum is opened."""
    least = 2
    if plans.distributed(run_file):
        sizes = [cloud.clients for cloud in run_file.clouds]
        least = max(least, fewest_clouds(sizes, run_file.privacy.dropouts))
    return run_file.secure.minimum_clients or least


def sum_mode(run_file: RunFile, base: Model) -> SumMode:
    """How updates are summed; measures a sensitivity map if the run file asks for one."""
    section = run_file.secure
    if section.sum == "plain":
        return Plain()
    hidden = _HIDDEN[section.sum](section.threshold, fewest_opened(run_file))
    selective = section.selective
    if selective is None:
        return hidden
    columns = mapping(selective.mapping)
    chosen = selection(run_file, selective, base, lora(run_file), rule(run_file), columns)
    return Selective(hidden, chosen)
