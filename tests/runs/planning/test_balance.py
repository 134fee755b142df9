"""Local steps and ranks by cloud."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.clouds import Cloud, Compute, Link
from fedjax_llm.errors import UserError
from fedjax_llm.models import DecoderConfig
from fedjax_llm.runs.planning.balance import (
    Pace,
    balanced_steps,
    largest_ranks,
    training_bytes,
)

PACES = st.lists(
    st.builds(Pace, st.floats(0.0, 100.0), st.floats(0.001, 100.0)), min_size=1, max_size=8
)


@given(PACES, st.integers(1, 64))
def test_no_cloud_holds_the_round_up_and_none_could_do_more(paces: list[Pace], most: int) -> None:
    whole = min(pace.seconds(most) for pace in paces)
    steps = balanced_steps(paces, most)
    assert max(steps) == most
    for pace, own in zip(paces, steps, strict=True):
        assert 1 <= own <= most
        assert own == 1 or pace.seconds(own) <= whole * (1 + 1e-6) + 1e-6 * pace.step
        assert own == most or pace.seconds(own + 1) > whole * (1 - 1e-6)


CONFIG = DecoderConfig(512, 64, 172, 5, 8, 4, 8)


def test_memory_grows_with_rank_rows_and_length_and_holds_the_base() -> None:
    def size(rank: int = 4, rows: int = 2, length: int = 64, remat: bool = False) -> float:
        return training_bytes(
            CONFIG, ["q_proj"], rank, value_bytes=4, rows=rows, length=length, remat=remat
        )

    assert size(rank=8) - size(rank=4) == pytest.approx(16 * 5 * 4 * (64 + 64))
    assert size(rows=4) > size() > size(remat=True)
    # Attention makes it grow faster than the length.
    assert size(length=256) - size(length=0) > 4 * (size(length=64) - size(length=0))
    assert size(rows=0) > 4 * 512 * 64


def test_each_cloud_takes_the_largest_rank_that_fits_it() -> None:
    def cloud(name: str, gib: float | None) -> Cloud:
        return Cloud(name, Link(10.0, 10.0), compute=Compute(1.0, memory_gib=gib))

    clouds = [cloud("large", 4.0), cloud("small", 1.0), cloud("silent", None)]
    sizes = {2: 0.5 * 2**30, 4: 1.0 * 2**30, 8: 3.0 * 2**30}
    assert largest_ranks(clouds, [2, 4, 8], sizes) == (8, 4, 8)
    with pytest.raises(UserError, match=r"'small' has 0\.25 GiB.*remat"):
        largest_ranks([cloud("small", 0.25)], [2, 4, 8], sizes)
