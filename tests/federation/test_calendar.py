"""What a message counts in its step: known when it is sent, and never next to nothing."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.clouds.schedules import Decoupled
from fedjax_llm.federation.calendar import Calendar
from tests.clouds.schedule_sites import site

SECONDS = st.sampled_from([0.5, 2.0, 40.0, 4000.0])


def calendar(up: list[float], steps: int, fragments: int = 1) -> Calendar:
    """Of decoupled clouds with so many seconds to send a message, one client each."""
    clouds = [site(place, up=seconds) for place, seconds in enumerate(up)]
    timeline = Decoupled(2, fragments).simulate(clouds, steps)
    return Calendar(Decoupled(2, fragments), timeline, range(len(up)), (), fragments)


@settings(max_examples=30, deadline=None)
@given(st.lists(SECONDS, min_size=3, max_size=4), st.integers(1, 2))
def test_a_step_is_never_divided_by_next_to_nothing(up: list[float], fragments: int) -> None:
    found = calendar(up, 12, fragments)
    for step in range(1, 13):
        landing = found.landing(step)
        assert landing.lands_K.sum() >= 2
        assert ((landing.factor_K >= 0.25) & (landing.factor_K <= 1))[landing.lands_K].all()


def test_what_a_message_counts_does_not_depend_on_what_comes_later() -> None:
    up = [40.0, 4000.0, 2.0]
    short, long = calendar(up, 6), calendar(up, 40)
    for step in range(1, 7):
        assert short.landing(step).factor_K.tolist() == long.landing(step).factor_K.tolist()


def test_an_ordinary_message_counts_half_and_one_of_long_waiting_whole() -> None:
    even = calendar([1.0, 1.0, 1.0], 12)
    for step in range(6, 13):  # the first ones, before a cloud has sent, hold fewer steps
        assert even.landing(step).factor_K.tolist() == [0.5] * 3
    thin = calendar([1.0, 1.0, 400.0], 400)
    found = {
        thin.timeline.cycle(place).held: float(thin.landing(step).factor_K[cloud])
        for step in range(6, 401)
        for cloud, place in thin.timeline.landing(step).items()
    }
    assert found.pop(3) == 0.5
    assert max(found) > 100 and found[max(found)] == 1.0
