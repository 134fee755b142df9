"""`batch_size` of a cloud in a run file: what the plan takes, and what is refused."""

from pathlib import Path

import pytest

from fedjax_llm.errors import FedJaxError, UserError
from fedjax_llm.runs import build, runfile

HEAD = """\
name = "q"
rounds = 2
[model]
name = "smollm2-135m"
[training]
batch_size = 8
[privacy]
unit = "example"
noise_multiplier = 1.0
sampling = "{sampling}"
{adaptive}

[[clouds]]
name = "eu"
data.sources = ["builtin:medical"]
batch_size = {own}

[[clouds]]
name = "us"
clients = 2
data.sources = ["builtin:finance"]
"""


def load(
    tmp_path: Path, own: int, sampling: str = "poisson", adaptive: str = ""
) -> runfile.RunFile:
    path = tmp_path / "q.toml"
    path.write_text(HEAD.format(own=own, sampling=sampling, adaptive=adaptive))
    return runfile.load(path)


def test_each_client_samples_at_its_own_batch_over_its_own_rows(tmp_path: Path):
    plan = build.plan(load(tmp_path, own=2), [40, 80, 160])
    assert plan.sampler.rates == pytest.approx((2 / 40, 8 / 80, 8 / 160), rel=1e-6)
    each = plan.epsilon_per_cloud()
    assert plan.epsilon() == max(each) == each[1]
    # With the run's own number it is as without the key.
    assert build.plan(load(tmp_path, own=8), [40, 80, 160]).sampler.rates[0] == pytest.approx(0.2)


@pytest.mark.parametrize(("clouds", "units"), [(2, [40, 80]), (1, [40])])
def test_a_size_that_all_clouds_name_is_the_plan_s(tmp_path: Path, clouds: int, units: list[int]):
    """They are alike then, and still not the run's."""
    head, eu, us = HEAD.split("\n[[clouds]]\n")
    us = us.replace("clients = 2", "batch_size = 2")
    path = tmp_path / "q.toml"
    text = "\n[[clouds]]\n".join([head, eu, us][: clouds + 1])
    path.write_text(text.format(own=2, sampling="poisson", adaptive=""))
    plan = build.plan(runfile.load(path), units)
    assert plan.sampler.rates == pytest.approx([2 / count for count in units], rel=1e-6)
    path.write_text(text.format(own=2, sampling="full", adaptive=""))
    assert build.plan(runfile.load(path), [2] * clouds).sampler.kind == "full"
    with pytest.raises(UserError, match=r"but batch_size is 2 and the clouds hold"):
        build.plan(runfile.load(path), [3] * clouds)


def test_full_sampling_is_by_each_cloud_s_own_batch(tmp_path: Path):
    run_file = load(tmp_path, own=2, sampling="full")
    assert build.plan(run_file, [2, 8, 8]).sampler.kind == "full"
    with pytest.raises(UserError, match=r"batch_size is \[2, 8, 8\] and the clouds hold \[8, 8, 8"):
        build.plan(run_file, [8, 8, 8])


def test_a_count_of_an_adaptive_clip_norm_is_noised_alike_for_all(tmp_path: Path):
    """The noise on it is one number, whatever divides the count afterwards."""
    own, alike = (
        build.plan(load(tmp_path, own=size, adaptive="adaptive = {}"), [40, 80, 160])
        for size in (2, 8)
    )
    assert own.adaptive == alike.adaptive
    assert own.noise_stddev == alike.noise_stddev


def test_a_batch_above_the_run_s_is_one_line(tmp_path: Path):
    with pytest.raises(FedJaxError) as caught:
        load(tmp_path, own=9)
    said = str(caught.value)
    assert "\n" not in said
    assert "batch_size must be at most 8, [training] batch_size" in said
    assert "9" in said
