"""The comparison's parts for an accelerator, in small and on the CPU."""

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.federation.objective import rows_loss
from fedjax_llm.lora import Adapter
from fedjax_llm.models import Batch

HERE = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"
TINY = "billion-tiny"


@pytest.fixture(scope="module")
def peers() -> Any:
    """Imports a module of the benchmark by name; they import each other by name too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.syspath_prepend(str(HERE / "peers"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def folder(peers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the task in small."""
    path = tmp_path_factory.mktemp("peers") / TINY
    peers("prepare").prepare(peers("tasks").TASKS[TINY], path)
    return path


def products(jaxpr: Any, times: int = 1) -> Iterator[tuple[float, set[str]]]:
    """Operations and dtypes of each matrix product of a program, those in loops as often."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left, right = (v.aval for v in eqn.invars)
            each = 2.0 * math.prod(eqn.outvars[0].aval.shape)
            each *= math.prod(left.shape[axis] for axis in contracted)
            yield times * each, {left.dtype.name, right.dtype.name}
        often = times * eqn.params.get("length", 1)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from products(getattr(inner, "jaxpr", inner), often)


def is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def test_a_round_is_counted_as_its_program_has_products(peers: Any, folder: Path) -> None:
    """Each product of forward and backward pass, from the program; and all of them in bfloat16."""
    ours, task = peers("ours"), peers("tasks").TASKS[TINY]
    federation = ours.federate(task, folder, 1)
    state = ours.start(federation, folder)
    model, adapter = federation.model, state.server.adapter
    everywhere = np.ones((task.batch, task.length), bool)
    tokens = peers("tasks").read_tokens(folder)[0]
    batch = Batch(tokens, everywhere, everywhere.astype(np.int32))

    def loss(adapter: Adapter, base: Any) -> jax.Array:
        return jnp.mean(rows_loss(model, base, adapter, batch, jnp.bfloat16, False))

    found = list(products(jax.make_jaxpr(jax.grad(loss))(adapter, model.base).jaxpr))
    config, positions = model.config, task.batch * task.length
    width = config.num_heads * config.head_dim
    # Ours computes what the causal mask hides, which no arithmetic needs: half of the scores.
    masked = 6.0 * config.num_layers * task.length * width * positions
    # The last token of a row has no next one; the others meet their own word once more.
    scored = task.batch * (task.length - 1)
    head = 4.0 * config.vocab_size * config.hidden_size * task.batch
    targets = 2.0 * config.hidden_size * scored
    norms = 4.0 * positions * config.hidden_size * (2 * config.num_layers + 1)
    counted = ours.model_flops(federation, state, task) / (task.clients * task.steps)
    assert sum(each for each, _ in found) == counted + masked + targets - head - norms
    assert norms < 0.01 * counted
    assert set().union(*(dtypes for _, dtypes in found)) == {"bfloat16"}


def test_our_round_in_bfloat16_is_that_in_float32_up_to_rounding(peers: Any, folder: Path) -> None:
    ours, tasks = peers("ours"), peers("tasks")
    task = replace(tasks.TASKS[TINY], steps=1)
    federation = ours.federate(task, folder, 1, clients_at_once=16, devices=jax.devices()[:1])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(federation.model.base)} == {"bfloat16"}
    begun = ours.start(federation, folder)
    state, report = federation.run_round(begun)
    leaves = jax.tree.leaves(state.server.adapter)
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}

    tokens_NxT = tasks.read_tokens(folder).reshape(-1, task.length)
    everywhere = np.ones(tokens_NxT.shape, bool)
    batch = Batch(tokens_NxT, everywhere, everywhere.astype(np.int32))
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), federation.model.base)
    exact_N = rows_loss(
        federation.model, base, begun.server.adapter, batch, jnp.float32, remat=False
    )
    apart = abs(report.loss_train_nats - float(jnp.mean(exact_N)))
    assert 0 < apart < peers("accelerator").SAME_LOSS


def test_a_billion_weights_are_what_the_sizes_come_to(peers: Any) -> None:
    from fedjax_llm.models import DecoderConfig
    from fedjax_llm.models.decoder import base_shapes

    config = DecoderConfig.from_hf(peers("prepare").BILLION)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(base_shapes(config))) == (
        1_235_814_400
    )


def test_peaks_are_of_whole_names_and_unknown_ones_are_refused(peers: Any) -> None:
    peaks = peers("peaks")
    found = {kind: peaks.peak_flops(kind) for kind in peaks.KINDS}
    assert all(1e13 < peak < 1e16 for peak in found.values())
    assert found["NVIDIA H100 80GB HBM3"] == found["NVIDIA H200"] > found["NVIDIA H100 NVL"]
    with pytest.raises(UserError, match=r"'NVIDIA H100 PCIe'.*add it to KINDS") as refused:
        peaks.peak_flops("NVIDIA H100 PCIe")
    assert "\n" not in str(refused.value)


class Told:
    """A side that has trained."""

    name = "ours"

    def __init__(self, seconds: list[float], **head: Any) -> None:
        self.head = head
        self.rounds = [{"seconds": each, "processor": each} for each in seconds]

    def steady(self, warm: int) -> list[float]:
        return [each["seconds"] for each in self.rounds[warm:]]


def test_utilisation_is_of_the_median_round_and_of_the_data_sheet(peers: Any) -> None:
    accelerator = peers("accelerator")
    device = accelerator.Device("gpu", "NVIDIA H100 80GB HBM3", "0")
    contest = accelerator.contest(TINY, device, 10e12)
    assert list(contest.bars.items()) == [("plain loop", 3.0)]

    def last(*seconds: float) -> dict[str, Any]:
        # The first does not count.
        return contest.own("ours", Told([9.0, *seconds], flops=2e12), 1)[-1]

    assert last(0.5, 0.4, 7.0) | {"name": ""} == {
        "name": "", "measured": pytest.approx(40.0), "bar": 40.0, "unit": "%", "met": True
    }  # fmt: skip
    assert not last(0.6, 0.6, 0.1)["met"]
    plain = [each["name"] for each in contest.own("plain loop", Told([9.0, 1.0]), 1)]
    assert not any("utilisation" in name for name in plain)


def test_forms_by_hand_are_tried_on_a_device_and_not_interpreted(peers: Any) -> None:
    accelerator, kernels = peers("accelerator"), peers("ours").KERNELS

    def forms(platform: str) -> list[set[str]]:
        contest = accelerator.contest(TINY, accelerator.Device(platform, "k", "0"), 1e12)
        return [
            set(way.options) & set(kernels) for way in contest.ours if "--pallas" in way.options
        ]

    assert forms("gpu") == forms("tpu") == [{"attention"}, set(kernels)]
    assert forms("cpu") == []


def test_where_the_loop_cannot_run_ours_is_measured_alone(
    peers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerator = peers("accelerator")

    class Lonely(accelerator.Utilised):
        def rows(self, turns: int, warm: int = 1) -> list[dict[str, Any]]:
            if self.peers:
                raise RuntimeError("no PyTorch here")
            assert not self.bars
            return [{"name": "ours"}]

    gpu, tpu = (accelerator.Device(name, "k", "0", 1e12) for name in ("gpu", "tpu"))
    for device, line in ((gpu, "no PyTorch here"), (tpu, "plain loop is not measured on a tpu")):
        given = vars(accelerator.contest(TINY, device, 2e12))
        rows = accelerator.measured(Lonely(**given), device, 1)
        assert [each.get("measured") for each in rows] == [2.0, 1.0, None]
        assert line in capsys.readouterr().out


def test_a_way_that_cannot_be_gone_is_not_the_fastest(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contests = peers("contests")
    ways = tuple(contests.Way("peer", f"{name}.py") for name in ("broken", "slow", "quick"))

    class Trial(Told):
        def __enter__(self) -> "Trial":
            return self

        def __exit__(self, *reason: object) -> None:
            pass

        def finish(self) -> "Trial":
            return self

    def side(way: Any, *given: Any, **more: Any) -> Trial:
        if way.script == "broken.py":
            raise RuntimeError("no compiler")
        return Trial([9.0, 2.0 if way.script == "slow.py" else 1.0])

    monkeypatch.setattr(contests.Way, "side", side)
    assert contests.fastest(ways, "t", tmp_path) == ways[2]
    with pytest.raises(RuntimeError, match="no way to run peer"):
        contests.fastest((ways[0], ways[0]), "t", tmp_path)


def test_an_interpreter_may_be_named(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDJAX_LLM_PEERS_PYTHON_PLAIN_CUDA", sys.executable)
    assert peers("sides").python_of("plain-cuda") == Path(sys.executable)


def test_without_an_accelerator_there_is_a_line_and_no_row(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    command = [sys.executable, HERE / "peers" / "run.py", "--only", "accelerator", "kernels"]
    told = subprocess.run(
        [*command, "--json", rows], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    assert json.loads(rows.read_text()) == []
    assert [line.split(",")[0] for line in told[:2]] == [
        "accelerator: not measured", "kernels: not measured"
    ]  # fmt: skip
    # And how long it took.
    assert len(told) == 3


@pytest.mark.drill
def test_each_kernel_has_its_share_of_the_roofline(peers: Any) -> None:
    rows = peers("accelerator").shares_of_rooflines("--quick")
    assert len(rows) > 6 and all(each["measured"] > 0 for each in rows)
    assert {each["unit"] for each in rows} == {"GB/s", "GFLOP/s", "%"}
    assert all(each["bar"] is None for each in rows)


@pytest.mark.drill
def test_the_whole_contest_in_small(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides in processes of their own, ways tried; needs an environment with PyTorch."""
    accelerator, sides = peers("accelerator"), peers("sides")
    variable = "FEDJAX_LLM_PEERS_PYTHON_PLAIN_CUDA"
    there = Path(os.environ.get(variable, sides.CACHE / "environments" / "plain" / "bin/python"))
    if not there.exists():
        pytest.skip(f"needs PyTorch and PEFT; name an interpreter that has them in {variable}")
    monkeypatch.setenv(variable, str(there))
    device = accelerator.Device.found(products=True)
    rows = accelerator.measured(accelerator.contest(TINY, device, device.products), device, 2)
    found = {each["name"].removeprefix(f"{TINY}: "): each for each in rows}
    assert 0 < found["ours, model FLOP utilisation"]["measured"] < 100
    assert found["ours against plain loop"]["measured"] > 0
    assert found["plain loop, largest difference of losses"]["met"]
    assert found["plain loop, fall of the loss meanwhile"]["measured"] > 0.1
