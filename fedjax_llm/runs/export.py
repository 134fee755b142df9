"""What a run learned, in the formats that other programs read."""

from pathlib import Path

import jax

from fedjax_llm.errors import UserError
from fedjax_llm.federation import init_state
from fedjax_llm.lora import Adapter, merge, write_peft
from fedjax_llm.models import Model, save_model
from fedjax_llm.runs import build, fingerprint, runfile
from fedjax_llm.runs.checkpoints import Checkpoints
from fedjax_llm.runs.events import Note, OnEvent, ignore
from fedjax_llm.runs.folder import RunFolder
from fedjax_llm.runs.runfile import RunFile


def export_peft(folder: RunFolder, out: Path, *, on_event: OnEvent = ignore) -> None:
    """Writes the last checkpoint's adapter as a PEFT folder.

    Raises:
        UserError: no checkpoint, one of another model or run, or `out` holds something already.
    """
    run_file, model, adapter = _trained(folder, out, on_event)
    name = run_file.model.name or str(model.folder)
    write_peft(out, adapter, build.lora(run_file), base_model_name=name)


def export_merged(folder: RunFolder, out: Path, *, on_event: OnEvent = ignore) -> None:
    """Writes the base model with the last checkpoint's adapter added to its weights.

    Raises:
        UserError: no checkpoint, one of another model or run, or `out` holds something already.
    """
    _, model, adapter = _trained(folder, out, on_event)
    save_model(out, model.config, merge(model.base, adapter), model.tokenizer)


def _trained(folder: RunFolder, out: Path, on_event: OnEvent) -> tuple[RunFile, Model, Adapter]:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something already; choose a folder that is new or empty")
    run_file = runfile.load(folder.run_toml)
    model = build.model(run_file, on_event)
    like = init_state(
        model.config,
        build.lora(run_file),
        build.rule(run_file),
        build.local_training(run_file),
        jax.random.key(run_file.seed),
        len(run_file.clouds),
    )
    found = Checkpoints(folder.checkpoints).latest(
        like=like, notify=lambda text: on_event(Note(text))
    )
    if found is None:
        raise UserError(f"{folder.path} has no checkpoint yet; `fedjax-llm resume` it first")
    # An adapter fits every model of its shapes, and means something on one.
    identity = fingerprint.of(run_file, model, ())
    fingerprint.check(found.metadata.get("fingerprint", {}), identity, folder.path)
    return run_file, model, found.tree.server.adapter
