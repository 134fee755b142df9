"""Sizes from parameters alone are those that a sum with keys counts."""

import numpy as np
import pytest

from fedjax_llm.federation.sums import Bfv, Ckks, Masked, Threshold
from fedjax_llm.secure.masked import MaskedSum
from fedjax_llm.secure.plain import PlainSum
from fedjax_llm.secure.sizes import sum_sizes
from fedjax_llm.secure.sums import collect

NAMES = ("north", "south", "far-west")
MODES = {"masked": Masked, "threshold": Threshold, "bfv": Bfv, "ckks": Ckks}


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize(("count", "max_abs"), [(4, 2**16), (1000, 127), (20_000, 3 * 2**14)])
def test_sizes_are_those_of_the_sum_itself(kind: str, count: int, max_abs: int) -> None:
    opened = MODES[kind](2).open(NAMES, count, max_abs)
    planned = sum_sizes(kind, len(NAMES), 2, count, max_abs, len(NAMES))
    assert planned.opening == opened.opening
    for name in NAMES:
        assert planned.upload_bytes(name) == opened.upload_bytes(name)


def test_sizes_of_a_plain_sum() -> None:
    planned = sum_sizes("plain", 3, 3, 300_000, 2**20, 3)
    assert planned.upload_bytes("a") == PlainSum(300_000, 2**20, 3).upload_bytes("a")
    assert planned.opening.parties == 0


@pytest.mark.parametrize("clients", [2, 5, 9])
def test_what_masked_clients_send_beside_uploads_is_known_to_a_tenth(clients: int) -> None:
    names = [f"cloud-{k}" for k in range(clients)]
    opened = Masked().open(names, 100, 127)
    assert isinstance(opened, MaskedSum)
    server = opened.begin(1)
    for name in names:
        server.add(name, opened.upload(name, 1, np.zeros(100, np.int64)))
    found = collect(server, names)
    assert sum(found.bytes_up.values()) == pytest.approx(clients * opened.opening.bytes_up, rel=0.1)
    assert sum(found.bytes_down.values()) == pytest.approx(
        clients * opened.opening.bytes_down, rel=0.1
    )
