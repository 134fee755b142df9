"""The choice of a form: from the table, or measured once and remembered."""

import json

import jax
import jax.numpy as jnp
import pytest

from fedjax_llm_kernels import choice


@pytest.fixture
def accelerator(monkeypatch):
    """The choices take this machine's device for one that is no CPU."""

    class Device:
        platform, device_kind = "gpu", "Test 9000"

    monkeypatch.setattr(choice, "device_of", lambda array: Device())


def forms():
    return {"xla": lambda x: x + 1, "pallas": lambda x: x * 2}


def timer_of(*seconds):
    """A timer that returns these, one for each call."""
    left = list(seconds)
    return (lambda run, arguments: left.pop(0)), left


def test_the_table_answers_and_a_wish_overrides_it(monkeypatch):
    kind = jax.devices()[0].device_kind
    assert choice.of("cross_entropy", None) == "xla"
    monkeypatch.setattr(choice, "BEST", {("cross_entropy", kind): "pallas"})
    assert choice.of("cross_entropy", None) == "pallas"
    assert choice.of("cross_entropy", "xla") == "xla"
    assert choice.of("clip_sum", None) == "xla"
    with pytest.raises(ValueError, match="got 'fast'"):
        choice.of("clip_sum", "fast")


def test_on_a_cpu_nothing_is_timed():
    timer, left = timer_of(1.0, 0.1)
    assert choice.Choices(timer=timer).pick("k", forms(), jnp.ones(3)) == "xla"
    assert len(left) == 2


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(("times", "faster"), [((2.0, 1.0), "pallas"), ((1.0, 2.0), "xla")])
def test_the_faster_form_is_timed_once_for_shape_and_dtype(times, faster):
    timer, left = timer_of(*times, *times, *times)
    choices = choice.Choices(timer=timer)
    for _ in range(3):
        assert choices.pick("k", forms(), jnp.ones(3)) == faster
    assert len(left) == 4
    choices.pick("k", forms(), jnp.ones(4))
    choices.pick("k", forms(), jnp.ones(4, jnp.bfloat16))
    assert left == []


@pytest.mark.usefixtures("accelerator")
def test_what_is_on_disk_is_never_measured_again(tmp_path):
    timer, _ = timer_of(2.0, 1.0)
    assert choice.Choices(tmp_path, timer).pick("k", forms(), jnp.ones(3)) == "pallas"
    timer, left = timer_of(1.0, 2.0)
    assert choice.Choices(tmp_path, timer).pick("k", forms(), jnp.ones(3)) == "pallas"
    assert len(left) == 2
    ((key, entry),) = json.loads((tmp_path / choice.FILE).read_text()).items()
    assert key == "k | Test 9000 | float32[3]"
    assert entry == {"chosen": "pallas", "xla_seconds": 2.0, "pallas_seconds": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == [choice.FILE]


@pytest.mark.usefixtures("accelerator")
def test_a_form_that_does_not_run_loses_and_the_record_says_why(tmp_path):
    def broken(x):
        raise NotImplementedError("no such instruction")

    choices = choice.Choices(tmp_path, lambda run, arguments: float(run(*arguments).sum()))
    assert choices.pick("k", {"xla": lambda x: x, "pallas": broken}, jnp.ones(3)) == "xla"
    (entry,) = json.loads((tmp_path / choice.FILE).read_text()).values()
    assert entry["pallas_failed"] == "NotImplementedError: no such instruction"


@pytest.mark.parametrize("text", ["{", "[1]", '{"k": 1}', '{"k": {"chosen": "fast"}}'])
def test_a_damaged_file_is_an_error_with_a_cure(tmp_path, text):
    (tmp_path / choice.FILE).write_text(text)
    with pytest.raises(ValueError, match="remove it to measure again"):
        choice.Choices(tmp_path)


def test_seconds_waits_for_the_result():
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 3_000_000, lambda i, y: jnp.sin(y), x))
    assert choice.seconds(slow, (jnp.float32(1),), repeats=1) > 1e-3
