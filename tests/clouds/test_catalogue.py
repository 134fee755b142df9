"""The catalogue: every figure has a source with a date, and a user's file wins key by key."""

import dataclasses
import re
from pathlib import Path

import pytest

from fedjax_llm.clouds import load_catalogue
from fedjax_llm.errors import UserError

FIGURES = load_catalogue()


def laid_over(tmp_path: Path, text: str):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    return load_catalogue(file)


def message(tmp_path: Path, text: str) -> str:
    with pytest.raises(UserError) as caught:
        laid_over(tmp_path, text)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_every_figure_has_a_source_and_every_source_a_date_and_a_use():
    used = set()
    for section in ("accelerators", "providers", "instances", "routes"):
        for name, entry in getattr(FIGURES, section).items():
            assert entry.source, (section, name)
            used.add(entry.source)
    for name, instance in FIGURES.instances.items():
        assert instance.price_source and instance.priced_in, name
        used.add(instance.price_source)
    used |= {provider.wide_area_source for provider in FIGURES.providers.values()}
    assert used == set(FIGURES.sources)
    for source in FIGURES.sources.values():
        assert re.fullmatch(r"20\d\d-\d\d(-\d\d)?", source.date) and len(source.title) > 20
        assert source.url.startswith("https://")


def test_every_machine_trains_and_costs():
    assert {instance.provider for instance in FIGURES.instances.values()} == {
        "aws",
        "azure",
        "gcp",
    }
    for name, instance in FIGURES.instances.items():
        speed = FIGURES.compute(name).for_model(6e9).speed
        # Between 5 and 110 TFLOP/s sustained per dollar and hour: a figure that slipped by a factor
        # of ten would stand out.
        per_dollar = speed * 6e9 / 1e12 / instance.dollars_per_hour
        assert 5 < per_dollar < 110, (name, per_dollar)
        assert FIGURES.prices(instance.provider, name).dollars(3600, 1e12) > 0
        assert FIGURES.compute(name).fits(15 * 2**30)


def test_figures_of_a_few_machines():
    p5 = FIGURES.compute("aws-p5-48xlarge", utilization=0.5)
    assert p5.accelerators == 8 and p5.peak_flops == 989e12 and p5.memory_gib == 80
    assert p5.for_model(1e9).speed == pytest.approx(8 * 989e12 * 0.5 / 1e9)
    assert FIGURES.compute("aws-p5-48xlarge", accelerators=2).accelerators == 2
    near = FIGURES.prices("aws", "aws-p5-48xlarge", "same-continent")
    assert near.dollars(7200, 10**12) == pytest.approx(2 * 55.04 + 1000 * 0.02)
    assert FIGURES.prices("gcp").dollars(7200, 2**30) == pytest.approx(0.12), "per GiB, no rent"
    with pytest.raises(UserError, match="'aws-p5-48xlarge' is one of aws, and the region is one"):
        FIGURES.prices("gcp", "aws-p5-48xlarge")


def test_classes_of_destinations():
    classes = {
        ("aws-us-east-1", "aws-us-east-1"): "same-region",
        ("aws-us-east-1", "aws-us-west-2"): "same-continent",
        ("aws-us-east-1", "aws-eu-central-1"): "other-continent",
        ("aws-us-east-1", "gcp-us-east4"): "internet",
    }
    for (here, there), expected in classes.items():
        assert FIGURES.destination(here, there) == expected


def test_routes_go_both_ways_and_streams_add_up_to_the_machines_limit():
    ends = ("aws-eu-central-1", "gcp-us-central1")
    assert FIGURES.route(*ends) is FIGURES.route(*ends[::-1])
    one = FIGURES.mbps(*ends, None, 1)
    assert FIGURES.mbps(*ends, None, 3) == 3 * one
    assert FIGURES.mbps(*ends, None, 1000) == 5000, "AWS's limit towards the wide area"
    assert FIGURES.mbps(*ends[::-1], None, 1000) == 7000, "Google's"
    assert FIGURES.mbps(*ends, "aws-g5-xlarge", 1000) == 2500, "the machine's own"
    for name, route in FIGURES.routes.items():
        here, there = (FIGURES.region(end) for end in name.split(" "))
        far = here.continent != there.continent
        # Light in fibre needs 50 ms for a round trip of 5000 km; nobody is faster than that.
        assert (60 if far else 1) < route.rtt_ms < 300, name
    with pytest.raises(UserError, match="knows the latency between azure-eastus and azure-westeu"):
        FIGURES.mbps("azure-eastus", "azure-westeurope", None, 1)
    with pytest.raises(UserError, match="no route between azure-eastus and gcp-us-east4; give"):
        FIGURES.route("azure-eastus", "gcp-us-east4")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: FIGURES.instance("aws-p5-48xlrge"), "did you mean 'aws-p5-48xlarge'?"),
        (lambda: FIGURES.region("aws-us-east1"), "did you mean 'aws-us-east-1'?"),
        (lambda: FIGURES.instance("???"), "`fedjax-llm clouds` lists them"),
    ],
)
def test_unknown_names_come_with_the_nearest(call, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        call()


def test_a_users_file_wins_key_by_key(tmp_path: Path):
    mine = laid_over(
        tmp_path,
        """
        [instances.aws-p5-48xlarge]
        dollars_per_hour = 30
        [accelerators.abacus]
        title = "Abacus"
        bf16_tflops = 0.5
        [instances.attic]
        provider = "home"
        accelerator = "abacus"
        accelerators = 3
        memory_gib = 8
        dollars_per_hour = 0
        [providers.home]
        unit = "GB"
        same_region = 0
        same_continent = 0
        other_continent = 0
        internet = [[0, 0.01], [50, 0.02]]
        [regions]
        home-attic = { provider = "home", continent = "europe" }
        [routes]
        "home-attic aws-eu-central-1" = { mbps = 40, rtt_ms = 31.5 }
        """,
    )
    listed = FIGURES.instances["aws-p5-48xlarge"]
    changed = mine.instances["aws-p5-48xlarge"]
    assert changed == dataclasses.replace(listed, dollars_per_hour=30.0)
    others = {n: i for n, i in mine.instances.items() if n not in ("aws-p5-48xlarge", "attic")}
    assert others == {n: i for n, i in FIGURES.instances.items() if n != "aws-p5-48xlarge"}
    assert mine.compute("attic").peak_flops == 0.5e12
    assert mine.prices("home", "attic").dollars(1, 51e9) == pytest.approx(0.52)
    assert mine.mbps("aws-eu-central-1", "home-attic", None, 2) == 80


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[instance.x]\n", "mine.toml: unknown section [instance]; did you mean 'instances'?"),
        ("instances = 3\n", "mine.toml: [instances] must be a table, got 3"),
        ("[instances]\nx = 3\n", "mine.toml: instances.x must be a table of keys and values"),
        (
            "[instances.aws-p5-48xlarge]\ndolars_per_hour = 3\n",
            "mine.toml: instances.aws-p5-48xlarge: unknown key dolars_per_hour; did you mean "
            "'dollars_per_hour'?",
        ),
        (
            "[instances.aws-p5-48xlarge]\ndollars_per_hour = -3\n",
            "mine.toml: instances.aws-p5-48xlarge: dollars_per_hour must be a number of zero or "
            "more, got -3",
        ),
        (
            "[instances.aws-p5-48xlarge]\ndollars_per_hour = nan\n",
            "mine.toml: instances.aws-p5-48xlarge: dollars_per_hour must be a number of zero or "
            "more, got nan",
        ),
        (
            "[instances.aws-p5-48xlarge]\naccelerators = 0\n",
            "mine.toml: instances.aws-p5-48xlarge: accelerators must be a whole number of at least "
            "1, got 0",
        ),
        (
            '[instances.aws-p5-48xlarge]\naccelerator = "h10"\n',
            "accelerator must be one of a10g, l4,",
        ),
        (
            '[accelerators.x]\ntitle = "X"\n',
            "mine.toml: accelerators.x: the key bf16_tflops is missing; add it",
        ),
        ("[accelerators.x]\ntitle = 5\n", "accelerators.x: title must be a text in quotes, got 5"),
        ('[providers.aws]\ninternet = "free"\n', "providers.aws: internet must be dollars, or"),
        (
            "[providers.aws]\ninternet = [[0, 1], [0, 2]]\n",
            "mine.toml: providers.aws: internet: egress tiers must begin at 0 and rise",
        ),
        ('[providers.aws]\nunit = "TB"\n', "unit must be one of GB, GiB, got 'TB'"),
        (
            '[providers.aws]\nsource = "hearsay"\n',
            "providers.aws: source must be one of aws-prices",
        ),
        (
            '[regions]\nx = { provider = "aws", continent = "atlantis" }\n',
            "regions.x: continent must be one of africa, asia",
        ),
        ('[routes]\n"a" = { rtt_ms = 1 }\n', "routes.'a' must name two regions with a space"),
        (
            '[routes]\n"aws-us-east-1 aws-us-east1" = { rtt_ms = 1 }\n',
            "unknown region 'aws-us-east1'; did you mean 'aws-us-east-1'?",
        ),
        ("[instances\n", "mine.toml: not valid TOML: "),
    ],
)
def test_users_files_that_are_none(tmp_path: Path, text, expected):
    assert expected in message(tmp_path, text)


def test_a_users_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot read the catalogue .*gone.toml: No such file"):
        load_catalogue(tmp_path / "gone.toml")
