"""Key ceremonies are made once and shared; round numbers then have to keep rising."""

import itertools
from collections.abc import Callable

import pytest

from fedjax_llm.secure import PlainSum, SecureSum, ThresholdSum

COUNT, MAX_INT, SUMMANDS = 50, 2**15 - 1, 6
CLOUDS = ("medical", "finance", "general")

_rounds = itertools.count()


@pytest.fixture
def new_round() -> Callable[[], int]:
    """A round number that no test has used."""
    return lambda: next(_rounds)


@pytest.fixture(scope="session")
def threshold_sum() -> ThresholdSum:
    """2 of 3 clouds."""
    return ThresholdSum(CLOUDS, 2, COUNT, MAX_INT, SUMMANDS, minimum_clients=1, threads=2)


@pytest.fixture(scope="session")
def three_of_four() -> ThresholdSum:
    """3 of 4 clouds, two ciphertexts per message."""
    return ThresholdSum(("a", "b", "c", "d"), 3, 9000, 2**22, 4, minimum_clients=2, threads=2)


@pytest.fixture(scope="session", params=["plain", "threshold"])
def secure_sum(request: pytest.FixtureRequest) -> SecureSum:
    """Both kinds, for the contract."""
    if request.param == "plain":
        return PlainSum(COUNT, MAX_INT, SUMMANDS)
    made: ThresholdSum = request.getfixturevalue("threshold_sum")
    return made
