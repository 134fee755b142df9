"""All kinds of sums for the contract, each made once; round numbers then have to keep rising."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from fedjax_llm.secure.channels import SimulatedChannels
from fedjax_llm.secure.sums import SecureSum

COUNT, MAX_INT, SUMMANDS = 50, 2**15 - 1, 6
CLIENTS = ("ann", "bob", "cat", "dan", "eve", "fay")
CLOUDS = ("medical", "finance", "general")
KINDS = ("plain", "masked", "threshold", "bfv", "ckks")
# Several chunks each.
LARGE = {
    "plain": 2 * 2**18 + 1000,
    "masked": 2 * 2**18 + 1000,
    "threshold": 45_000,
    "bfv": 45_000,
    "ckks": 45_000,
}
LARGE_SUMMANDS = 3

_rounds = itertools.count()


@pytest.fixture
def new_round() -> Callable[[], int]:
    """A round number that no test has used."""
    return lambda: next(_rounds)


@dataclass(frozen=True)
class Case:
    """One kind of sum. All instances of a case hold for ``CLIENTS`` and at least two of them."""

    kind: str

    @functools.cached_property
    def channels(self) -> SimulatedChannels:
        """The MAC keys that all instances but ``other`` share."""
        return SimulatedChannels()

    @functools.cached_property
    def small(self) -> SecureSum:
        """50 integers of 16 bits from up to six clients."""
        return self.make(COUNT, SUMMANDS, self.channels)

    @functools.cached_property
    def other(self) -> SecureSum:
        """As ``small``, with other keys."""
        return self.make(COUNT, SUMMANDS, None)

    @functools.cached_property
    def large(self) -> SecureSum:
        """Several chunks per client, and three clients at most."""
        return self.make(LARGE[self.kind], LARGE_SUMMANDS, self.channels)

    @property
    def helpers(self) -> tuple[str, ...]:
        """Who can help to decrypt."""
        return {"plain": (), "masked": CLIENTS}.get(self.kind, CLOUDS)

    @property
    def threshold(self) -> int:
        """How many of them it takes."""
        return {"plain": 0, "masked": 4}.get(self.kind, 2)

    def make(self, count: int, summands: int, channels: SimulatedChannels | None) -> SecureSum:
        """A new instance. Modules are imported here so that a kind's tests need that kind only."""
        options: dict[str, Any] = {"minimum_clients": 2, "channels": channels}
        sizes = count, MAX_INT, summands
        if self.kind == "plain":
            from fedjax_llm.secure.plain import PlainSum

            return PlainSum(*sizes, **options)
        if self.kind == "masked":
            from fedjax_llm.secure.masked import MaskedSum

            return MaskedSum(CLIENTS, *sizes, **options)
        if self.kind == "threshold":
            from fedjax_llm.secure.threshold import ThresholdSum

            return ThresholdSum(CLOUDS, 2, *sizes, **options)
        from fedjax_llm.secure import library_sum

        made = {"bfv": library_sum.BfvSum, "ckks": library_sum.CkksSum}[self.kind]
        return made(CLOUDS, 2, *sizes, **options)

    def parties(self, secure_sum: Any, round_number: int) -> dict[str, Any]:
        """The helpers' objects, to be silenced."""
        if self.kind == "plain":
            return {}
        if self.kind == "masked":
            return dict(secure_sum.rounds.parties(round_number).clients)
        return dict(secure_sum.holders.parties)


@functools.cache
def case_of(kind: str) -> Case:
    """The case of this kind, made once in a session."""
    return Case(kind)


@pytest.fixture(scope="session", params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    """Every kind, for the contract."""
    return case_of(request.param)


@pytest.fixture(scope="session", params=KINDS[1:])
def helped(request: pytest.FixtureRequest) -> Case:
    """The kinds in which other parties help to decrypt."""
    return case_of(request.param)


@pytest.fixture(scope="session")
def all_cases() -> list[Case]:
    """All kinds at once."""
    return [case_of(kind) for kind in KINDS]
