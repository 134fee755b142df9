"""Real jobs on the smallest real model, through the command line, with compiled programs kept."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from fedjax_llm import cli
from fedjax_llm.runs.folder import metrics
from fedjax_llm.runs.folder.checkpoints import Checkpoints

# Unit client: its noise and its accountant are quick, and the clouds keep optimiser state, which
# has to survive in checkpoints. The vocabulary of 512 makes long texts, hence 96 tokens.
RUN_FILE = """\
name = "small"
seed = 3
rounds = 3

[model]
path = "{model}"

[adapter]
rank = 2
alpha = 4.0

[training]
local_steps = 2
batch_size = 4
microbatch = 4
sequence_length = 96
template = "plain"
learning_rate = 1e-2

[aggregation]
server_optimizer = "momentum"

[privacy]
unit = "client"
clip_norm = 1.0
noise_multiplier = 0.1

[secure]
sum = "threshold"
threshold = 2

[evaluation]
examples_per_cloud = 8

[[clouds]]
name = "medical"
data = {{ sources = ["builtin:medical"], limit = 40, eval_fraction = 0.2 }}

[[clouds]]
name = "finance"
data = {{ sources = ["builtin:finance"], limit = 40, eval_fraction = 0.2 }}

[[clouds]]
name = "general"
data = {{ sources = ["builtin:general"], limit = 40, eval_fraction = 0.2 }}
"""


@dataclass(frozen=True)
class Jobs:
    """Starts jobs.

    Attributes:
      run_file: three rounds of three clouds, summed under encryption.
      cache: compiled programs of all jobs of this test session.
    """

    run_file: Path
    cache: Path

    def start(self, *arguments: str | Path, code: str = "") -> subprocess.Popen[str]:
        """The command line as a process; `code` is run in it first."""
        program = f"{code}\nfrom fedjax_llm.cli import main\nmain()"
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def command(self, *arguments: str | Path) -> str:
        """Runs a command in a process of its own to its good end; returns what it printed."""
        with self.start(*arguments) as process:
            output, error = process.communicate()
        assert (process.returncode, error) == (0, "")
        return output

    def here(self, *arguments: str | Path) -> int:
        """Runs a command in this process, which has imported everything; returns its exit code."""
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        return int(ended.value.code or 0)

    def compiled(self, program: str) -> set[str]:
        """The compiled programs in the cache whose names begin with `program`."""
        return {entry.name for entry in self.cache.glob(f"{program}*-cache")}

    @staticmethod
    def state(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        """Every array of a run's last checkpoint, adapter and optimisers, as bytes."""
        found = Checkpoints(folder / "checkpoints").latest()
        assert found is not None
        return {
            name: (str(leaf.dtype), np.shape(leaf), leaf.tobytes())
            for name, leaf in found.tree.items()
        }

    @staticmethod
    def rounds(folder: Path) -> list[dict[str, Any]]:
        """A run's metrics without clock readings."""
        return [metrics.without_clock(record) for record in metrics.read(folder / "metrics.jsonl")]


@pytest.fixture(scope="session")
def job_files(tmp_path_factory: pytest.TempPathFactory, stories260k: Path) -> Jobs:
    """What the jobs of a session share."""
    folder = tmp_path_factory.mktemp("jobs")
    run_file = folder / "small.toml"
    run_file.write_text(RUN_FILE.format(model=stories260k))
    return Jobs(run_file, folder / "cache")


@pytest.fixture
def jobs(job_files: Jobs) -> Iterator[Jobs]:
    """Starts jobs; those in this process use the programs that earlier ones compiled."""
    settings = {
        "jax_compilation_cache_dir": str(job_files.cache),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield job_files
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def ended_well(job_files: Jobs) -> Callable[[str], Path]:
    """The folder of the run file's job by how its programs are compiled."""

    @functools.cache
    def of(setting: str) -> Path:
        # Other jobs of the session may have compiled the same programs before.
        for program in ("jit__train", "jit__apply"):
            for name in job_files.compiled(program):
                (job_files.cache / name).unlink()
        folder = job_files.run_file.parent / f"never killed {setting}"
        job_files.command("run", job_files.run_file, "--out", folder)
        assert job_files.compiled("jit__train")
        return folder

    return of


@pytest.fixture
def never_killed(ended_well: Callable[[str], Path]) -> Path:
    """The folder of the run file's job, freshly compiled and run to its end. Only to be read."""
    return ended_well(os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"])
