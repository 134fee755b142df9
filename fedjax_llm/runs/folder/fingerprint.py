"""What the rounds of a run depend on, as hashes: a resumed run can tell that it is the same run.

A draw of noise has an address, not a history: a round that is repeated on other data adds the same
noise to another sum, and whoever saw both would see the difference without any. And an epsilon
counts all rounds at the settings of the last. So a run whose model, data or settings have changed
is not continued.

Left out is what a user may change between two processes: `rounds` (with independent noise),
`[privacy] budget`, `[evaluation]`, `[checkpoint]`,
links, the rounds in which a cloud is offline, and what fits the work into memory and time
(`microbatch`, `remat`, `unroll`, `clients_at_once`; these move results by rounding). Paths are left
out too: it is the content that counts, and a folder may have been moved. What a selective
encryption encrypts moves no result; a change between two processes would uncover more than either
says, and is refused.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_llm.clouds.schedules import Synchronous
from fedjax_llm.data import Corpus
from fedjax_llm.errors import UserError
from fedjax_llm.federation.calendar import Calendar
from fedjax_llm.models import Model
from fedjax_llm.runs.sections.clouds import Cloud
from fedjax_llm.runs.sections.partition import DividingKeys
from fedjax_llm.runs.sections.privacy import CORRELATED
from fedjax_llm.runs.sections.schema import RunFile
from fedjax_llm.runs.sections.types import BUILTIN_PREFIX

PyTree = Any
# From the words for a part of a run to the sha256 of what it was, hexadecimal.
Fingerprint = dict[str, str]

_SECTIONS = ("adapter", "training", "aggregation", "privacy", "secure", "schedule")
_OF_CLOUDS = {
    *("rank", "local_steps", "batch_size", "weight", "clients", "partition"),
    *DividingKeys.model_fields,
}
# What fits the work into memory, and the budget, which says when to stop.
_FREE = {"microbatch", "remat", "unroll", "clients_at_once", "budget"}


def of(run_file: RunFile, base: Model, corpora: Sequence[Corpus]) -> Fingerprint:
    """The fingerprint of a run, by the words that an error names each part with.

    Args:
      run_file: the settings.
      base: the model as loaded; every weight is hashed.
      corpora: one for each cloud, in the order of the run file; every row is hashed. None where
        the data do not matter, as in an export.
    """
    names = [cloud.name for cloud in run_file.clouds]
    found = {"seed": _text(run_file.seed), "clouds": _text(names)}
    for name in _SECTIONS:
        settings = getattr(run_file, name).model_dump(mode="json")
        kept = {key: value for key, value in settings.items() if key not in _FREE}
        if kept.get("selective") is not None:
            kept["selective"] = _selective(kept["selective"])
        found[f"section [{name}]"] = _text(kept)
    own = [_of_cloud(run_file, cloud) for cloud in run_file.clouds]
    if run_file.aggregation.weights in ("loss", "loss-bounded"):
        # Elsewhere a link is a matter of time and money; here it weighs its cloud.
        own += [cloud.link.model_dump(mode="json") for cloud in run_file.clouds]
    found["settings of the clouds"] = _text(own)
    if run_file.privacy.unit != "none" and run_file.privacy.noise in CORRELATED:
        found["rounds, for which the correlated noise is made"] = _text(run_file.rounds)
    for name in ("attack", "compression"):
        section = getattr(run_file, name)
        found[f"section [{name}]"] = _text(section and section.model_dump(mode="json"))
    # Where weights are kept in a way of their own, they do not tell what is computed in.
    computed = [] if run_file.model.weights is None else [run_file.model.dtype]
    found["model"] = _text([repr(base.config), _arrays(base.base), *computed])
    found["tokenizer"] = base.tokenizer.sha256
    for corpus in corpora:
        found[f"data of cloud {corpus.name!r}"] = _arrays((corpus.train, corpus.evaluation))
    return found


def of_timeline(calendar: Calendar) -> Fingerprint:
    """Who lands when, for schedules in which that follows from links and machines.

    So rounds cannot be added to such a run: what is under way at its end depends on where that is.
    """
    if isinstance(calendar.schedule, Synchronous):
        return {}
    digest = hashlib.sha256(calendar.timeline.table_M.tobytes())
    return {"timeline of the clouds (links, machines, failures, rounds)": digest.hexdigest()}


def check(saved: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
    """Checks that what a run began with is at hand; parts that `now` leaves out are not compared.

    Args:
      saved: the fingerprint in the checkpoint.
      now: the fingerprint of what is at hand.
      folder: of the run, for the message.

    Raises:
      UserError: they differ; names the first part that does.
    """
    for part in now:
        if saved.get(part) != now[part]:
            raise UserError(
                f"{folder}: the {part} at hand is not what its rounds ran with; "
                "restore it, or start a new run"
            )


def _of_cloud(run_file: RunFile, cloud: Cloud) -> dict[str, Any]:
    """What of a cloud's settings counts; its batch only where it has one of its own."""
    kept = cloud.model_dump(mode="json", include=_OF_CLOUDS)
    if kept["batch_size"] in (None, run_file.training.batch_size):
        del kept["batch_size"]
    return kept


def _selective(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the content of files in place of their paths."""
    kept = dict(settings)
    if kept["map"] is not None:
        kept["map"] = _file(Path(kept["map"]))
    if kept["measure_on"] is not None:
        kept["measure_on"] = [
            source if source.startswith(BUILTIN_PREFIX) else _file(Path(source))
            for source in kept["measure_on"]
        ]
    return kept


def _file(path: Path) -> str:
    """The content of a file, or of a folder's files with their names."""
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        name = str(file.relative_to(path)) if path.is_dir() else ""
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


def _text(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _arrays(tree: PyTree) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.ascontiguousarray(jax.device_get(leaf))
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        # As bytes: hashlib does not know every dtype that JAX does.
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()
