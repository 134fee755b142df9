"""Checkpoints: bit-exact, atomic under SIGKILL and full disks, and honest about damage."""

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder.checkpoints import Checkpoints

TREE = {
    "a": np.array([[0.1, np.nan, -0.0], [np.inf, 1e-45, -3]], np.float32),
    "nested": (np.int32(3), {"h": np.ones(3, ml_dtypes.bfloat16)}, np.uint32([2**32 - 1])),
    "wide": np.array([2**62, -1], np.int64),
    "flag": np.array(True),
    "none": np.zeros((0, 3), np.float32),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
}


def assert_same_bits(left: object, right: object) -> None:
    def check(x: np.ndarray, y: np.ndarray) -> None:
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())

    jax.tree.map(check, left, right)


def damage(folder: Path) -> None:
    """Flips one bit in the middle of the largest file."""
    largest = max(
        (entry for entry in folder.rglob("*") if entry.is_file()),
        key=lambda entry: entry.stat().st_size,
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))


def test_bits_come_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest(TREE) is None
    checkpoints.save(3, TREE, {"note": ["x", 1]})
    found = checkpoints.latest(TREE)
    assert found is not None
    assert (found.round, found.metadata) == (3, {"note": ["x", 1]})
    assert_same_bits(found.tree, TREE)
    named = Checkpoints(tmp_path / "c").latest()
    assert named is not None
    assert named.tree["['wide']"].tolist() == [2**62, -1]


def test_the_devices_of_the_time_of_saving_do_not_matter(tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()), ("clouds",))
    values = jnp.arange(8, dtype=jnp.float32)
    sharded = jax.device_put(values, NamedSharding(mesh, PartitionSpec("clouds")))
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"x": sharded})
    found = checkpoints.latest({"x": jax.ShapeDtypeStruct((8,), jnp.float32)})
    assert found is not None
    assert isinstance(found.tree["x"], np.ndarray)
    assert_same_bits(found.tree, {"x": np.arange(8, dtype=np.float32)})


def test_the_last_ones_are_kept_and_given_up_ones_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for round in range(4):
        checkpoints.save(round, {"x": np.float32(round)})
    assert checkpoints.rounds() == [2, 3]
    checkpoints.save(2, {"x": np.float32(20)})
    found = Checkpoints(tmp_path / "c").latest()
    assert found is not None
    assert (found.round, found.tree["['x']"]) == (2, 20)


def test_damage_is_told_and_the_one_before_is_used(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for round in range(3):
        checkpoints.save(round, {"x": np.arange(1000.0) + round})
    damage(tmp_path / "c" / "2" / "state")
    notes: list[str] = []
    found = Checkpoints(tmp_path / "c").latest({"x": np.zeros(1000)}, notes.append)
    assert found is not None
    assert found.round == 1
    assert len(notes) == 1 and "checkpoint of round 2 is damaged" in notes[0]
    assert "\n" not in notes[0]
    (tmp_path / "c" / "1" / "manifest" / "metadata").write_bytes(b"")
    damage(tmp_path / "c" / "0" / "state")
    with pytest.raises(UserError, match=r"no checkpoint .* can be read"):
        Checkpoints(tmp_path / "c").latest(notify=notes.append)


@pytest.mark.parametrize(
    "like",
    [{"y": np.zeros(2)}, {"x": np.zeros(3)}, {"x": np.zeros(2, np.float32)}, {}, [np.zeros(2)]],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, like: object) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"x": np.zeros(2)})
    with pytest.raises(UserError, match="belongs to another run"):
        checkpoints.latest(like)


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)


SAVE_FOREVER = """
import sys, itertools, numpy as np
from pathlib import Path
from fedjax_llm.runs.folder.checkpoints import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]))
found = checkpoints.latest()
for round in itertools.count(0 if found is None else found.round + 1):
    rng = np.random.default_rng(round)
    checkpoints.save(round, {"x": rng.random(20_000), "y": {"z": rng.random(50)}}, {"r": round})
    print(round, flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    for attempt in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(folder)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            reported = int(process.stdout.readline())
            time.sleep(0.017 * (attempt + 1))  # somewhere inside a later save
            process.send_signal(signal.SIGKILL)
            for line in process.stdout:
                reported = int(line)
        notes: list[str] = []
        found = Checkpoints(folder).latest(notify=notes.append)
        assert found is not None
        assert notes == []
        assert found.round >= reported  # what was reported as saved is there
        assert found.metadata == {"r": found.round}
        rng = np.random.default_rng(found.round)
        assert_same_bits(found.tree["['x']"], rng.random(20_000))
        assert_same_bits(found.tree["['y']['z']"], rng.random(50))
    # The next writer removes what the killed ones left half-written.
    checkpoints = Checkpoints(folder)
    checkpoints.save(found.round + 1, {"x": np.zeros(1)})
    assert all(entry.name.isdecimal() for entry in folder.iterdir())


FULL_DISK = """
import sys, resource, numpy as np
from pathlib import Path
from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder.checkpoints import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(1, {"x": np.arange(100_000.0)})
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    checkpoints.save(2, {"x": np.random.default_rng(0).random(100_000)})
except UserError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(checkpoints.rounds(), checkpoints.latest().tree["['x']"].sum())
checkpoints.save(2, {"x": np.zeros(3)})
print(sorted(entry.name for entry in Path(sys.argv[1]).iterdir()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [200_000, 1_000])
def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path: Path, limit: int) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path / "c"), str(limit)],
        capture_output=True,
        text=True,
    )
    first, second, third = done.stdout.splitlines()
    assert first.startswith("the disk is full: could not write ")
    assert "fedjax-llm resume" in first
    assert second == f"[1] {np.arange(100_000.0).sum()}"
    assert third == "['1', '2']"
    assert done.stderr == ""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY


def test_a_disk_that_fills_while_orbax_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import orbax.checkpoint as ocp

    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"x": np.zeros(3)})

    def full(*args: object, **kwargs: object) -> None:
        raise ValueError("OUT_OF_RANGE: Error writing: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(UserError, match="the disk is full"):
            checkpoints.save(2, {"x": np.ones(3)})
    assert checkpoints.rounds() == [1]
    checkpoints.save(2, {"x": np.ones(3)})
    assert checkpoints.rounds() == [1, 2]
