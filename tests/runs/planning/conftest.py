"""A small run file with a plan, its model and data, read once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedjax_llm.data import Corpus
from fedjax_llm.models import Model
from fedjax_llm.runs import build, runfile
from fedjax_llm.runs.events import ignore
from fedjax_llm.runs.runfile import RunFile

PLAN_FILE = """\
name = "planned"
seed = 5
rounds = 4

[model]
path = "{model}"

[adapter]
rank = 2
targets = ["q_proj", "v_proj"]

[training]
local_steps = 2
batch_size = 4
microbatch = 4
sequence_length = 48
template = "plain"
optimizer = "adam"
learning_rate = 1e-2

[privacy]
unit = "none"

[secure]
threshold = 2

[evaluation]
examples_per_cloud = 4
aggregation_error = false

[plan]
target_tokens = 20000
ranks = [1, 2]
local_steps = [1, 4]
bits = [8]
schedules = ["synchronous", "deadline", "decoupled"]

[[clouds]]
name = "near"
link = {{ up_mbps = 50.0, down_mbps = 200.0, latency_ms = 10.0 }}
compute = {{ tokens_per_second = 2000.0 }}
prices = {{ dollars_per_hour = 3.0, egress_dollars_per_gb = 0.09 }}
data = {{ sources = ["builtin:medical"], limit = 40, eval_fraction = 0.2 }}

[[clouds]]
name = "far"
link = {{ up_mbps = 1.0, down_mbps = 8.0, latency_ms = 120.0, jitter_ms = 30.0 }}
compute = {{ tokens_per_second = 500.0 }}
prices = {{ dollars_per_hour = 1.0, egress_dollars_per_gb = 0.12 }}
data = {{ sources = ["builtin:finance"], limit = 40, eval_fraction = 0.2 }}

[[clouds]]
name = "frail"
link = {{ up_mbps = 10.0, down_mbps = 80.0, latency_ms = 40.0 }}
compute = {{ tokens_per_second = 1000.0 }}
availability = {{ mtbf_s = 20.0, mttr_s = 2.0 }}
data = {{ sources = ["builtin:general"], limit = 40, eval_fraction = 0.2 }}
"""


@dataclass(frozen=True)
class Case:
    """A run file with its model and data."""

    run_file: RunFile
    base: Model
    data: list[Corpus]


@pytest.fixture(scope="session")
def plan_file(tmp_path_factory: pytest.TempPathFactory, stories260k: Path) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.toml"
    path.write_text(PLAN_FILE.format(model=stories260k))
    return path


@pytest.fixture(scope="session")
def opened(plan_file: Path) -> tuple[Model, list[Corpus]]:
    run_file = runfile.load(plan_file)
    base = build.model(run_file, ignore)
    return base, build.corpora(run_file, base, ignore)


@pytest.fixture(scope="session")
def case(plan_file: Path, opened: tuple[Model, list[Corpus]]) -> Callable[..., Case]:
    """The case with overrides, none of which may change model or data."""
    return lambda *overrides: Case(runfile.load(plan_file, overrides), *opened)
