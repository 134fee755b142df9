"""The cache of compiled programs, and what a run says of its first round."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import jax, jax.numpy as jnp
from fedjax_llm.runs import compiled
from fedjax_llm.runs.events import RoundFinished
compiled.LEAST_SECONDS = 0.0
compiled.keep()
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
with compiled.FirstRound(print) as told:
    jax.jit(lambda x: jnp.sin(x) * 2)(jnp.ones(3)).block_until_ready()
    told(RoundFinished({"round": 0}))
    told(RoundFinished({"round": 1}))
    told(RoundFinished({"round": 2}))
"""


def run(**environment: str) -> list[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("Note")]


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    first = run(FEDJAX_LLM_CACHE=str(tmp_path))
    assert len(first) == 1, "said once, after round 1"
    assert "round 1 was done" in first[0]
    assert "came from the cache" not in first[0]
    assert list((tmp_path / "compiled").iterdir())
    second = run(FEDJAX_LLM_CACHE=str(tmp_path))
    assert "compiling 0 programs" in second[0]
    assert "more came from the cache" in second[0]


def test_a_folder_that_jax_is_told_is_left_alone(tmp_path: Path) -> None:
    told = tmp_path / "elsewhere"
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(told),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run(FEDJAX_LLM_CACHE=str(tmp_path), **own)
    assert list(told.iterdir())
    assert not (tmp_path / "compiled").exists()


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    """What is read back is run."""
    folder = tmp_path / "compiled"
    folder.mkdir()
    folder.chmod(0o777)
    run(FEDJAX_LLM_CACHE=str(tmp_path))
    assert not list(folder.iterdir())
