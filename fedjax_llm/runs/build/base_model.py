"""The base model of a run, and the devices over which it is cut."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_llm.errors import UserError
from fedjax_llm.federation.layout import check_host_memory
from fedjax_llm.federation.mesh import MeshShape
from fedjax_llm.models import Model, load_config, load_model
from fedjax_llm.models.sharding import check_sizes
from fedjax_llm.runs.events import Note, OnEvent, Stage
from fedjax_llm.runs.sections.schema import RunFile


def model_folder(run_file: RunFile, on_event: OnEvent) -> Path:
    """The folder of the run's base model, fetched first when it is named and not cached."""
    from fedjax_llm.models import hub

    section = run_file.model
    if section.path is not None:
        return Path(section.path)
    assert section.name is not None
    return hub.get(section.name, on_progress=lambda text: on_event(Note(text)))


def model(run_file: RunFile, on_event: OnEvent) -> Model:
    """Loads the run's base model, fetching it first when it is named and not cached."""
    section, folder = run_file.model, model_folder(run_file, on_event)
    on_event(Stage("model", section.name or folder.name))
    mesh, kept = run_file.devices.mesh, section.weights or section.dtype
    check_sizes(load_config(folder), mesh.data, mesh.model)
    with _on_host() if mesh.data * mesh.model > 1 else contextlib.nullcontext():
        if kept == "float32" or kept == "bfloat16":
            return load_model(folder, dtype=jnp.dtype(kept))
        return load_model(folder, dtype=jnp.dtype(section.dtype), quantised=kept)


def _on_host() -> contextlib.AbstractContextManager[Any]:
    """Arrays are made in the host's memory: a model that is cut may fit on no device as a whole."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError(
            "[devices] mesh cuts the weights, which pass through the host's memory, and "
            "JAX_PLATFORMS leaves out the CPU; add cpu to it, at the end"
        ) from None
    return jax.default_device(host)


def mesh(run_file: RunFile) -> MeshShape:
    """How the devices are divided."""
    found = run_file.devices.mesh
    return MeshShape(found.clouds, found.data, found.model)


def check_devices(run_file: RunFile) -> None:
    """Refuses devices that a run cannot be laid out over, before anything is loaded.

    They do not fill its mesh, or cannot read the memory of their host, where its rows should lie.

    Raises:
        UserError: as said.
    """
    mesh(run_file).over(jax.devices())
    if run_file.devices.rows == "host":
        check_host_memory(jax.local_devices())
