"""A simulation without keys, programs or training is that of the run."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from fedjax_llm.data import Corpus
from fedjax_llm.models import Model
from fedjax_llm.runs import build
from fedjax_llm.runs.planning.candidates import Candidate, apply, grid
from fedjax_llm.runs.planning.screen import Costed, Screen
from fedjax_llm.runs.planning.search import spread
from fedjax_llm.runs.runfile import RunFile
from fedjax_llm.runs.sections.plan import PlanSection
from fedjax_llm.runs.sections.schedule import ScheduleSection

SUMS = ("plain", "masked", "threshold", "bfv", "ckks")
SYNCHRONOUS = ScheduleSection()
WAYS = (
    SYNCHRONOUS,
    ScheduleSection(name="deadline", quorum=2, seconds=0.5),
    ScheduleSection(name="buffered", size=2),
    ScheduleSection(name="streaming", fragments=2, overlap=True),
    ScheduleSection(name="decoupled", quorum=2, fragments=2),
)


@pytest.mark.parametrize("kind", SUMS)
def test_uploads_and_times_are_those_of_the_federation(kind: str, case: Callable) -> None:
    own = case(f"secure.sum={kind}")
    one = Candidate(2, 2, 8, SYNCHRONOUS)
    seen = Screen(own.run_file, own.base, own.data).outlook(one, 4)
    built = build.federation(apply(own.run_file, one, rounds=4), own.base, own.data)
    # As bytes: what a cloud did not reach is NaN.
    table_M, built_M = seen.calendar.timeline.table_M, built.calendar.timeline.table_M
    assert table_M.tobytes() == built_M.tobytes()
    assert seen.calendar.timeline.steps == built.calendar.timeline.steps
    hidden = built._hidden
    if hidden is not None:
        assert seen.sums is not None and seen.sums.opening() == hidden.opening()
        for codec, name in itertools.product(seen.parts.codecs[0], built.names):
            assert seen.sums.upload_bytes(codec, name) == hidden.upload_bytes(codec, name)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_timelines_of_all_schedules_are_those_of_the_federation(
    way: ScheduleSection, case: Callable
) -> None:
    own = case("secure.sum=masked")
    one = Candidate(4, 2, None, way, cloud_steps=(4, 1, 2))
    seen = Screen(own.run_file, own.base, own.data).outlook(one, 6)
    # A trial adds in the plain and takes the time of the masked sum.
    built = build.federation(apply(own.run_file, one, rounds=6), own.base, own.data, trial=True)
    # As bytes: what a cloud did not reach is NaN.
    table_M, built_M = seen.calendar.timeline.table_M, built.calendar.timeline.table_M
    assert table_M.tobytes() == built_M.tobytes()


def test_totals_are_what_rounds_report(case: Callable) -> None:
    own = case("secure.sum=masked")
    one = Candidate(2, 2, 8, ScheduleSection(name="buffered", size=2), cloud_steps=(2, 1, 1))
    totals = Screen(own.run_file, own.base, own.data).totals(one, 3)
    built = build.federation(apply(own.run_file, one, rounds=3), own.base, own.data)
    done = [report for _, report in built.rounds(built.init(), 3)]
    assert totals.seconds_N[-1] == pytest.approx(sum(own.seconds_virtual for own in done))
    assert totals.dollars_N[-1] == pytest.approx(sum(own.dollars for own in done))
    # What the masks take beside uploads is known roughly.
    assert totals.up_N[-1] == pytest.approx(sum(own.uplink_bytes for own in done), rel=0.05)
    assert totals.down_N[-1] == pytest.approx(sum(own.downlink_bytes for own in done), rel=0.05)
    assert totals.tokens_N[-1] == pytest.approx(sum(own.tokens for own in done))


@pytest.fixture(scope="module")
def screened(case: Callable) -> tuple[Any, list[Costed]]:
    own = case("secure.sum=masked")
    return own, Screen(own.run_file, own.base, own.data).candidates(own.run_file.plan)


def test_candidates_have_files_that_are_valid(screened: tuple[Any, list[Costed]]) -> None:
    own, found = screened
    plan = own.run_file.plan
    assert {one.candidate.schedule.name for one in found} == set(plan.schedules)
    assert len({one.candidate for one in found}) == len(found)
    for one in found[::5]:
        made = apply(own.run_file, one.candidate)
        assert RunFile.model_validate(made.model_dump()) == made
        assert all(value > 0 for value in one.step.values()) and one.work > 0


def test_balanced_candidates_give_slow_clouds_less_to_do(
    screened: tuple[Any, list[Costed]],
) -> None:
    _, found = screened
    balanced = [one for one in found if one.candidate.cloud_steps]
    assert balanced
    for one in balanced:
        near, far, _ = one.candidate.cloud_steps
        assert far <= near == one.candidate.local_steps
    # It pays where all wait for all: a balanced round is shorter.
    seconds = {
        bool(one.candidate.cloud_steps): one.step["seconds"]
        for one in found
        if one.candidate.schedule == SYNCHRONOUS
        and (one.candidate.local_steps, one.candidate.rank, one.candidate.bits) == (4, 2, 8)
    }
    assert seconds[True] < seconds[False]


def test_pilots_are_spread_over_the_choices(screened: tuple[Any, list[Costed]]) -> None:
    own, found = screened
    plan: PlanSection = own.run_file.plan
    chosen = spread(found, plan, 5)
    price = [one.step["seconds"] / one.work for one in found]
    assert chosen[0].step["seconds"] / chosen[0].work == min(price)
    assert len({one.candidate.schedule.name for one in chosen}) >= 2
    assert len({one.candidate.local_steps for one in chosen}) >= 2
    assert len(spread(found[:3], plan, 9)) == 3


def test_bits_of_a_plain_sum_of_whole_messages_are_no_choice(
    case: Callable, opened: tuple[Model, list[Corpus]]
) -> None:
    own = case("aggregation.rule=fedask", "plan.bits=[4, 8]")
    assert {one.bits for one in grid(own.run_file, own.run_file.plan)} == {None}
    other = case("plan.bits=[4, 8]")
    assert {one.bits for one in grid(other.run_file, other.run_file.plan)} == {None, 4, 8}
