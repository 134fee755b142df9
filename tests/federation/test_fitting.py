"""How many clients run at once."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.errors import UserError
from fedjax_llm.federation.fitting import evened, most_that_fit, on_a_cpu, program_bytes


@given(
    fixed=st.integers(1, 10_000),
    each=st.integers(1, 1_000),
    bend=st.integers(0, 50),
    clients=st.integers(1, 300),
    memory=st.integers(100, 200_000),
)
def test_the_answer_fits_and_twice_as_many_would_not(
    fixed: int, each: int, bend: int, clients: int, memory: int
) -> None:
    """Also where bytes grow faster than in a line, which the first two do not show."""

    def bytes_of(group: int) -> int:
        return fixed + each * group + bend * group * group

    limit = int(memory * 0.9)
    if bytes_of(1) > limit:
        with pytest.raises(UserError, match="one client takes"):
            most_that_fit(bytes_of, clients, memory)
        return
    group = most_that_fit(bytes_of, clients, memory)
    assert bytes_of(group) <= limit
    assert group == clients or group & (group - 1) == 0
    if bend == 0 and group < clients:
        assert 2 * group > clients or bytes_of(2 * group) > limit


def test_few_programs_are_compiled() -> None:
    tried: list[int] = []

    def bytes_of(group: int) -> int:
        tried.append(group)
        return 1000 + 10 * group

    assert most_that_fit(bytes_of, 10_000, 8000) == 512
    assert tried == [1, 2, 512]


@pytest.mark.optimised
def test_bytes_are_those_of_the_compiled_program() -> None:
    """A sort needs its input, its output and something beside them."""
    size = 4 * 1000
    compiled = jax.jit(jnp.sort).lower(jnp.zeros(1000)).compile()
    assert 2 * size <= program_bytes(compiled) <= 5 * size


@pytest.mark.parametrize(
    ("clients", "rows", "group"),
    [(8, 128, 4), (8, 8192, 1), (3, 1, 3), (3, 208, 1), (1000, 64, 8), (997, 64, 8)],
)
def test_a_cpu_batches_short_rows_and_leaves_no_gap(clients: int, rows: int, group: int) -> None:
    assert on_a_cpu(clients, rows) == group


@given(clients=st.integers(1, 1000), group=st.integers(1, 1000))
def test_even_groups_are_no_more_groups(clients: int, group: int) -> None:
    even = evened(clients, group)
    assert even <= max(group, 1)
    assert -(-clients // even) == -(-clients // group)
