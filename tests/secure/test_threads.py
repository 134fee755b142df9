"""Work in order on threads, and what becomes of it when nobody asks for more."""

import threading

import pytest

from fedjax_llm.errors import Refused
from fedjax_llm.secure.threads import in_order


@pytest.mark.parametrize("threads", [1, 3])
def test_in_order_is_map_and_makes_few_ahead(threads):
    made = []

    def double(number):
        made.append(number)
        return 2 * number

    results = in_order(double, range(50), threads)
    for number in range(50):
        assert next(results) == 2 * number
        assert len(made) <= number + 1 + threads
    assert next(results, None) is None

    def failing(number):
        if number == 4:
            raise Refused("four")
        return number

    with pytest.raises(Refused, match="four"):
        list(in_order(failing, range(50), threads))


def test_results_that_are_left_half_way_wait_for_nothing():
    """The garbage collector closes them at any moment, where waiting would be for ever."""
    leave, closed = threading.Event(), threading.Event()

    def slow(number):
        if number:
            leave.wait(60)
        return number

    results = in_order(slow, range(9), 2)
    assert next(results) == 0

    def close():
        results.close()
        closed.set()

    threading.Thread(target=close, daemon=True).start()
    try:
        assert closed.wait(20)
    finally:
        leave.set()
