"""What the server pays: by its region, by `server_prices`, and nothing without either."""

from pathlib import Path

import pytest

from fedjax_llm.runs.build import cloud_profiles

from .test_cloud_profiles import load, message, profile

REGION = 'server_region = "gcp-us-central1"'
EUROPE = 'region = "gcp-europe-west4"\nlink = { up_mbps = 10, down_mbps = 10, latency_ms = 50 }'


def test_without_a_word_it_pays_nothing(tmp_path: Path):
    assert profile(tmp_path).server.dollars(1e9, 1e15) == 0


def test_its_region_gives_the_price_of_what_it_sends(tmp_path: Path):
    figures = cloud_profiles.catalogue(load(tmp_path))
    elsewhere = profile(tmp_path, "", REGION).server
    assert elsewhere == figures.prices("gcp", None, "internet")
    assert elsewhere.dollars(3600.0, 10**12) == figures.prices("gcp").dollars(0.0, 10**12) > 0
    here = profile(tmp_path, EUROPE, REGION).server
    assert here.destination == "other-continent"
    assert here.dollars(0.0, 10**12) < elsewhere.dollars(0.0, 10**12)


def test_keys_that_are_given_win(tmp_path: Path):
    prices = "server_prices = { dollars_per_hour = 2.0, egress_dollars_per_gb = 0.5, machines = 3 }"
    for top in (prices, f"{REGION}\n{prices}"):
        server = profile(tmp_path, EUROPE if REGION in top else "", top).server
        assert server.dollars(3600.0, 10**9) == pytest.approx(6.5)


@pytest.mark.parametrize(
    ("prices", "words"),
    [
        ("{ dollars_per_hour = -1 }", "[server_prices] dollars_per_hour must be"),
        ("{ dollars = 1 }", "[server_prices] dollars; did you mean dollars_per_hour?"),
        ('{ destination = "moon" }', "[server_prices] destination must be one of"),
    ],
)
def test_prices_that_cannot_be_are_one_clear_line(prices: str, words: str, tmp_path: Path):
    assert words in message(tmp_path, "", f"server_prices = {prices}")
