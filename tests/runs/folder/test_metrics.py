"""metrics.jsonl and summary.json: strict JSON, torn lines, and sums that are the sums."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.runs.folder import metrics, summary
from fedjax_llm.runs.folder.metrics import CloudRecord, RoundRecord
from fedjax_llm.runs.folder.tensorboard import TensorBoard


def rounds(last: int) -> list[RoundRecord]:
    records = [
        RoundRecord(round=0, loss_eval_nats=2.0, clouds={"a": CloudRecord(loss_eval_nats=2.0)})
    ]
    for number in range(1, last + 1):
        records.append(
            RoundRecord(
                round=number,
                epsilon=float(number),
                delta=1e-5,
                uplink_bytes=100,
                downlink_bytes=10,
                seconds_train=1.5,
                seconds_round=2.0,
                tokens=64,
                clouds={
                    "a": CloudRecord(
                        loss_eval_nats=2.0 - number / 10, uplink_bytes=100, downlink_bytes=10
                    )
                },
            )
        )
    return records


def written(path: Path, last: int) -> list[RoundRecord]:
    records = rounds(last)
    for record in records:
        metrics.append(path, record)
    return records


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert metrics.read(path) == []
    records = written(path, 3)
    assert metrics.read(path) == records


@given(cut=st.integers(1, 60))
def test_a_torn_last_line_is_dropped_and_then_replaced(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    records = written(path, 2)
    path.write_bytes(path.read_bytes()[:-cut])
    assert metrics.read(path) == records[:-1]
    metrics.append(path, records[-1])
    assert metrics.read(path) == records


def test_truncate_drops_later_rounds_and_leaves_other_bytes_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = written(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as file:
        file.write(b'{"round": 4, "tor')
    assert metrics.truncate(path, 2) == records[:3]
    assert path.read_bytes() == b"".join(lines[:3])
    assert metrics.truncate(path, -1) == []
    assert path.read_bytes() == b""
    assert metrics.truncate(tmp_path / "none", 3) == []


@pytest.mark.parametrize("line", [b"not json", b"[]", b"{}", b'{"round": "1"}', b"\xff"])
def test_a_broken_line_in_the_middle_names_its_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"round": 0}\n' + line + b'\n{"round": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: "):
        metrics.read(path)


def test_json_is_strict_and_says_why_a_number_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = RoundRecord(
        round=1,
        epsilon=math.inf,
        epsilon_reason="no noise is added",
        update_norm=np.float32("nan"),
        tokens=np.int64(5),
        clouds={"a": CloudRecord(loss_eval_nats=math.inf)},
    )
    metrics.append(path, record)
    parsed = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert parsed == {
        "round": 1,
        "epsilon": None,
        "epsilon_reason": "no noise is added",
        "update_norm": None,
        "update_norm_reason": "not a number",
        "tokens": 5,
        "clouds": {"a": {"loss_eval_nats": None, "loss_eval_nats_reason": "infinite"}},
    }


def test_without_clock_keeps_everything_else() -> None:
    record = RoundRecord(
        round=1,
        seconds_train=1.0,
        seconds_virtual=2.0,
        tokens_per_second=3.0,
        tokens=4,
        clouds={"a": CloudRecord(seconds_link=1.0, examples=2)},
    )
    assert metrics.without_clock(record) == {
        "round": 1,
        "tokens": 4,
        "clouds": {"a": {"examples": 2}},
    }


def test_the_summary_adds_up_and_survives_the_disk(tmp_path: Path) -> None:
    result = summary.summarise(
        rounds(3), name="x", seed=1, sample=summary.Sample("p", "b", "a"), versions={"jax": "1"}
    )
    cloud = result.clouds["a"]
    assert (cloud.loss_before_nats, cloud.loss_after_nats) == (2.0, 1.7)
    assert (result.uplink_bytes, cloud.uplink_bytes, result.tokens) == (300, 300, 192)
    assert (result.epsilon, result.seconds["train"], result.seconds_total) == (3.0, 4.5, 6.0)
    assert result.loss_fell_in_every_cloud
    (tmp_path / "summary.json").write_text(result.to_json())
    assert json.loads(result.to_json())["loss_fell_in_every_cloud"] is True
    assert summary.read(tmp_path / "summary.json") == result
    assert summary.read(tmp_path / "none.json") is None


def test_the_share_of_the_sum_is_that_of_all_rounds_of_training() -> None:
    """The evaluation before them is none."""
    records = rounds(3)
    records[0] |= RoundRecord(seconds_round=100.0, seconds_add=100.0)
    assert summary.summarise(records, name="x", seed=1).secure_share == 0.0
    records[1] |= RoundRecord(seconds_encrypt=0.02, seconds_add=0.01)
    records[2] |= RoundRecord(seconds_decrypt=0.05)
    records[3] |= RoundRecord(seconds_decrypt=1.5)
    found = summary.summarise(records, name="x", seed=1).secure_share
    assert found == pytest.approx((0.02 + 0.01 + 0.05 + 1.5) / 6)
    assert summary.summarise(records[:1], name="x", seed=1).secure_share is None


@pytest.mark.parametrize("after", [2.0, 2.5, None])
def test_a_loss_that_did_not_fall_is_not_said_to_have_fallen(after: float | None) -> None:
    records = rounds(1)
    records[1]["clouds"]["a"]["loss_eval_nats"] = after
    assert not summary.summarise(records, name="x", seed=1).loss_fell_in_every_cloud
    assert not summary.summarise([], name="x", seed=1).loss_fell_in_every_cloud


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"loss_fell_in_every_cloud": true}'])
def test_a_damaged_summary_is_a_user_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match="damaged or of another version"):
        summary.read(tmp_path / "summary.json")


def test_tensorboard_holds_each_round_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401  (it is installed)
    from tensorboardX.proto.event_pb2 import Event

    records = rounds(3)
    # What was not measured is no point, and no warning of the writer's either.
    records[1]["update_norm"], records[2]["update_norm"] = 0.5, math.nan
    records[1]["clouds"]["a"]["loss_train_nats"] = math.inf
    with TensorBoard(tmp_path / "tb", records[:3]):
        pass
    with TensorBoard(tmp_path / "tb", records[:2]) as board:
        for record in records[2:]:
            board.add(record)
    (file,) = (tmp_path / "tb").iterdir()
    steps, tags = [], []
    data = file.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        steps += [event.step for value in event.summary.value if value.tag == "a/loss_eval_nats"]
        tags += [(value.tag, event.step) for value in event.summary.value]
        data = data[16 + length :]
    assert steps == [0, 1, 2, 3]
    assert [step for tag, step in tags if tag == "run/update_norm"] == [1]
    assert "a/loss_train_nats" not in dict(tags)
