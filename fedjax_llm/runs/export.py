"""What a run learned, in the formats that other programs read."""

from pathlib import Path

from fedjax_llm.aggregation import AggregationRule, ServerState
from fedjax_llm.errors import UserError
from fedjax_llm.federation import adapter_of
from fedjax_llm.lora import Adapter, add_dense, merge, write_peft
from fedjax_llm.models import Model, dequantised_base, save_model
from fedjax_llm.runs import build, runfile
from fedjax_llm.runs.events import Note, OnEvent, ignore
from fedjax_llm.runs.folder import RunFolder, fingerprint
from fedjax_llm.runs.folder.checkpoints import Checkpoints
from fedjax_llm.runs.sections.schema import RunFile


def export_peft(
    folder: RunFolder, out: Path, *, cloud: str | None = None, on_event: OnEvent = ignore
) -> None:
    """Writes the last checkpoint's adapter as a PEFT folder.

    Args:
        folder: of the run.
        out: a folder that is new or empty.
        cloud: whose adapter, where a rule leaves each client its own.
        on_event: is told what goes on.

    Raises:
        UserError: no checkpoint, one of another model or run, `out` holds something already, a rule
            that folds its results into the base, a cloud that is missing or has no adapter of its
            own.
    """
    run_file, model, server, adapter = _trained(folder, out, cloud, on_event)
    if server.residual:
        raise UserError(
            f"rule {run_file.aggregation.rule!r} folds its results into the base weights, which "
            "PEFT's format does not hold; export --merged OUT instead"
        )
    name = run_file.model.name or str(model.folder)
    write_peft(out, adapter, build.lora(run_file), base_model_name=name)


def export_merged(
    folder: RunFolder, out: Path, *, cloud: str | None = None, on_event: OnEvent = ignore
) -> None:
    """Writes the base model with all that the last checkpoint has learned added to its weights.

    Arguments and errors are those of `export_peft`; any rule can be merged. A quantised base is
    written in floats.
    """
    _, model, server, adapter = _trained(folder, out, cloud, on_event)
    base = add_dense(model.base, server.residual) if server.residual else model.base
    # What a quantised base stands for is what the adapter was trained on.
    merged = dequantised_base(merge(base, adapter), base["embed"].dtype)
    save_model(out, model.config, merged, model.tokenizer)


def _trained(
    folder: RunFolder, out: Path, cloud: str | None, on_event: OnEvent
) -> tuple[RunFile, Model, ServerState, Adapter]:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something already; choose a folder that is new or empty")
    run_file = runfile.load(folder.run_toml)
    rule = build.rule(run_file)
    client = _client(run_file, rule, cloud)
    model = build.model(run_file, on_event)
    like = build.state(run_file, model)
    found = Checkpoints(folder.checkpoints).latest(
        like=like, notify=lambda text: on_event(Note(text)), part=True
    )
    if found is None:
        raise UserError(f"{folder.path} has no checkpoint yet; `fedjax-llm resume` it first")
    # An adapter fits every model of its shapes, and means something on one.
    identity = fingerprint.of(run_file, model, ())
    fingerprint.check(found.metadata.get("fingerprint", {}), identity, folder.path)
    adapter = adapter_of(rule, found.tree, client)
    return run_file, model, found.tree.server, adapter


def _client(run_file: RunFile, rule: AggregationRule, cloud: str | None) -> int | None:
    """The place of a cloud's first client among all clients."""
    names = [own.name for own in run_file.clouds]
    if cloud is None:
        if rule.kept:
            raise UserError(
                f"rule {rule.name!r} leaves each cloud an adapter of its own; say whose with "
                f"--cloud NAME, one of {', '.join(names)}"
            )
        return None
    if not rule.kept:
        raise UserError(f"rule {rule.name!r} has one adapter for all clouds; leave --cloud out")
    if cloud not in names:
        raise UserError(f"no cloud {cloud!r} in this run; there are {', '.join(names)}")
    return sum(own.clients for own in run_file.clouds[: names.index(cloud)])
