"""`[privacy] sampling` means what it says: what cannot be accounted for is refused, not ignored."""

from typing import Any

import pytest
from pydantic import ValidationError

from fedjax_llm.errors import UserError
from fedjax_llm.runs import build
from fedjax_llm.runs.runfile import RunFile


def settings(**privacy: Any) -> RunFile:
    return RunFile.model_validate(
        {
            "name": "one",
            "rounds": 3,
            "model": {"name": "smollm2-135m"},
            "training": {"batch_size": 8},
            "privacy": privacy,
            "clouds": [{"name": "a", "data": {"sources": ["builtin:medical"]}}],
        }
    )


@pytest.mark.parametrize("unit", ["example", "client"])
def test_fixed_batches_certify_nothing(unit: str) -> None:
    with pytest.raises(ValidationError, match="fixed-size batches certify no epsilon"):
        settings(unit=unit, sampling="fixed")


def test_fixed_batches_are_what_a_run_without_privacy_uses() -> None:
    assert build.plan(settings(sampling="fixed"), [40]).sampler.kind == "fixed"


def test_full_participation_of_clients_has_rate_one() -> None:
    with pytest.raises(ValidationError, match="must be 1 with sampling"):
        settings(unit="client", sampling="full", client_rate=0.5)
    plan = build.plan(settings(unit="client", sampling="full"), [40])
    assert plan.sampler.kind == "full"


def test_full_participation_of_examples_needs_whole_batches() -> None:
    run_file = settings(unit="example", sampling="full")
    with pytest.raises(UserError, match=r"batch_size is 8 and the clouds hold \[40\]"):
        build.plan(run_file, [40])
    assert build.plan(run_file, [8]).sampler.kind == "full"
