"""Checkpoints: the whole state of a run after a round, on disk through Orbax, kept atomically.

A checkpoint is a pytree of arrays plus a little JSON. Orbax writes it to a temporary folder and
renames that when it is complete, so a process killed at any moment leaves the checkpoints before
it and at worst a temporary folder, which the next writer removes. Beside the arrays lies the
sha256 of each, because a rename does not protect from a disk that returns other bytes.

Arrays come back as NumPy arrays of the same dtype, shape and bytes, whatever devices or sharding
they had when they were saved.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder import disk

PyTree = Any


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round.

    Attributes:
      round: the round after which it was taken (0: before training).
      tree: the state, with NumPy arrays as leaves.
      metadata: the JSON that was saved with it.
    """

    round: int
    tree: PyTree
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run folder; reading never changes the folder.

    Args:
      folder: where they lie; made by the first `save`.
      keep: how many of the last checkpoints stay, at least 1.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise UserError(f"[checkpoint] keep must be at least 1, got {keep}")
        self.folder = Path(folder).absolute()
        self.keep = keep
        self._manager: Any = None

    def rounds(self) -> list[int]:
        """The rounds of which a complete checkpoint exists, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.folder.iterdir() if entry.name.isdecimal())

    def save(self, round: int, tree: PyTree, metadata: Mapping[str, Any] | None = None) -> None:
        """Writes the state after `round` and returns when it is complete.

        Checkpoints of the same or later rounds, which a resumed run gave up, are removed first.

        Args:
          round: the round after which the state was taken.
          tree: pytree of NumPy or JAX arrays or numbers, fully addressable from this process.
          metadata: JSON values to keep with it.

        Raises:
          UserError: the disk is full; the previous checkpoint is intact.
        """
        import orbax.checkpoint as ocp

        leaves = _named_leaves(tree)
        manifest = {
            name: {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "sha256": _sha256(leaf)}
            for name, leaf in leaves.items()
        }
        # Orbax refuses arrays without elements; the manifest alone says all there is about them.
        arrays = {name: leaf for name, leaf in leaves.items() if leaf.size}
        items = {
            "manifest": ocp.args.JsonSave({"leaves": manifest, "metadata": dict(metadata or {})})
        }
        if arrays:
            items["state"] = ocp.args.StandardSave(arrays)
        with disk.full_disk_is_a_user_error(self.folder / str(round)), _quiet():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                # Asked first: Orbax reports a full disk from several threads at once, on stderr.
                disk.reserve(self.folder, sum(leaf.nbytes for leaf in arrays.values()))
                manager = self._writer()
                for stale in [step for step in manager.all_steps() if step >= round]:
                    manager.delete(stale)
                if not manager.save(round, args=ocp.args.Composite(**items), force=True):
                    raise RuntimeError(f"orbax declined to save the checkpoint of round {round}")
                disk.sync_folder(self.folder)
            except BaseException:
                self._discard(round)
                raise

    def latest(
        self,
        like: PyTree = None,
        notify: Callable[[str], None] | None = None,
        *,
        check: Callable[[dict[str, Any]], None] = lambda metadata: None,
        part: bool = False,
    ) -> Checkpoint | None:
        """The newest checkpoint that can be read, or None when there is none.

        Args:
          like: a pytree of the structure, dtypes and shapes expected (arrays or
            `jax.ShapeDtypeStruct`). Without it the tree is a flat dict from `jax.tree_util.keystr`
            names to arrays.
          notify: is told, in one line, of each damaged checkpoint that was passed over.
          check: is given the metadata before the tree is compared with `like`; it raises where they
            show that the checkpoint is of another run, in better words.
          part: whether `like` may be a part of what was saved, which is all that is given then.

        Raises:
          UserError: there are checkpoints and all of them are damaged, or the newest readable one
            belongs to another run (other names, dtypes or shapes than `like`).
        """
        rounds = self.rounds()
        for round in reversed(rounds):
            try:
                leaves, metadata = self._read(round)
            except Exception as error:
                # Whatever a damaged file makes the reader raise, the cure is the one before it.
                if round == rounds[0]:
                    raise UserError(
                        f"no checkpoint in {self.folder} can be read ({_first_line(error)})"
                    ) from error
                if notify is not None:
                    notify(
                        f"the checkpoint of round {round} is damaged ({_first_line(error)}); "
                        "going back to the one before it"
                    )
                continue
            check(metadata)
            tree = leaves if like is None else _fit(leaves, like, self.folder / str(round), part)
            return Checkpoint(round, tree, metadata)
        return None

    def close(self) -> None:
        """Releases Orbax's threads."""
        if self._manager is not None:
            with _quiet():
                self._manager.close()
            self._manager = None

    def _writer(self) -> Any:
        import orbax.checkpoint as ocp

        if self._manager is None:
            own = jax.process_index()
            options = ocp.CheckpointManagerOptions(
                create=False,
                # Of several processes one writes, and waits for none.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=own, active_processes={own}
                ),
                max_to_keep=self.keep,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
                save_root_metadata=False,
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager

    def _discard(self, round: int) -> None:
        """Removes what a failed save left; a new manager then starts from what is on the disk."""
        self.close()
        for entry in self.folder.glob(f"{round}.*"):
            shutil.rmtree(entry, ignore_errors=True)

    def _read(self, round: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        import orbax.checkpoint as ocp

        folder = self.folder / str(round)
        with _quiet():
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
                saved = reader.restore(folder / "manifest", args=ocp.args.JsonRestore())
            arrays = {}
            if (folder / "state").exists():
                with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                    arrays = reader.restore(folder / "state", args=ocp.args.StandardRestore())
        leaves = {}
        for name, entry in saved["leaves"].items():
            shape, dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])
            leaf = np.asarray(arrays[name]) if name in arrays else np.zeros(shape, dtype)
            if (leaf.dtype, leaf.shape) != (dtype, shape) or _sha256(leaf) != entry["sha256"]:
                raise ValueError(f"the bytes of {name} are not the ones that were saved")
            leaves[name] = leaf
        return leaves, saved["metadata"]


def _named_leaves(tree: PyTree) -> dict[str, np.ndarray]:
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): np.ascontiguousarray(jax.device_get(leaf)).reshape(
            np.shape(leaf)
        )
        for path, leaf in named
    }


def _fit(leaves: dict[str, np.ndarray], like: PyTree, where: Path, part: bool) -> PyTree:
    named, structure = jax.tree_util.tree_flatten_with_path(like)
    expected = {jax.tree_util.keystr(path): leaf for path, leaf in named}
    differ = expected.keys() - leaves.keys() if part else leaves.keys() ^ expected.keys()
    if differ:
        name = min(differ)
        raise UserError(f"{where} belongs to another run: {name} is in only one of the two")
    for name, leaf in expected.items():
        # Plain numbers have neither dtype nor shape; NumPy says what they are saved as.
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        wanted, found = (dtype, np.shape(leaf)), (leaves[name].dtype, leaves[name].shape)
        if wanted != found:
            raise UserError(
                f"{where} belongs to another run: {name} is {found[0]}{list(found[1])}, "
                f"expected {wanted[0]}{list(wanted[1])}"
            )
    return jax.tree_util.tree_unflatten(structure, [leaves[name] for name in expected])


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs its housekeeping, and each error that it also raises; the user sees neither."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
