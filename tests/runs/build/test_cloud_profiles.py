"""Clouds in a run file: what it says wins over the catalogue; contradictions are one line."""

from pathlib import Path

import pytest

from fedjax_llm import cli
from fedjax_llm.clouds import Always, Cloud, Failures, Rate, Trace, training_flops
from fedjax_llm.errors import FedJaxError
from fedjax_llm.models import DecoderConfig
from fedjax_llm.runs import runfile
from fedjax_llm.runs.build import cloud_profiles

HEAD = """\
name = "q"
rounds = 2
{top}
[model]
name = "smollm2-135m"

[[clouds]]
name = "eu"
data.sources = ["builtin:medical"]
{cloud}

[[clouds]]
name = "us"
data.sources = ["builtin:finance"]
"""


def load(tmp_path: Path, cloud: str = "", top: str = "") -> runfile.RunFile:
    path = tmp_path / "q.toml"
    path.write_text(HEAD.format(cloud=cloud, top=top))
    return runfile.load(path)


def profile(tmp_path: Path, cloud: str = "", top: str = "") -> Cloud:
    return cloud_profiles.profiles(load(tmp_path, cloud, top))[0]


def message(tmp_path: Path, cloud: str = "", top: str = "") -> str:
    with pytest.raises(FedJaxError) as caught:
        load(tmp_path, cloud, top)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_without_a_word_it_is_a_plain_link(tmp_path: Path):
    cloud = profile(tmp_path)
    link = cloud.link
    assert (link.up_mbps, link.down_mbps, link.latency_ms, link.loss) == (100.0, 100.0, 20.0, 0.0)
    assert cloud.compute is None and cloud.availability == Always()
    assert cloud.prices.dollars(1e6, 1e12) == 0


def test_an_instance_and_regions_say_everything(tmp_path: Path):
    cloud = profile(
        tmp_path,
        'instance = "aws-p5-48xlarge"\nregion = "aws-eu-central-1"',
        'server_region = "gcp-us-central1"',
    )
    figures = cloud_profiles.catalogue(load(tmp_path))
    route = figures.route("aws-eu-central-1", "gcp-us-central1")
    assert cloud.link.up_mbps == cloud.link.down_mbps == route.mbps
    assert cloud.link.latency_ms == route.rtt_ms / 2
    assert cloud.compute is not None and cloud.compute.accelerators == 8
    assert cloud.prices.destination == "internet" and cloud.prices.dollars_per_hour == 55.04
    assert (cloud.region, cloud.instance) == ("aws-eu-central-1", "aws-p5-48xlarge")


def test_keys_that_are_given_win(tmp_path: Path):
    cloud = profile(
        tmp_path,
        """instance = "aws-p5-48xlarge"
        region = "aws-eu-central-1"
        link = { up_mbps = 50, latency_ms = 7, streams = 2, jitter_ms = 3 }
        compute = { utilization = 0.5, accelerators = 4 }
        prices = { dollars_per_hour = 30, egress_dollars_per_gb = 0.05, machines = 2 }
        availability = { mtbf_s = 9000, mttr_s = 1000 }""",
        'seed = 5\nserver_region = "aws-us-east-1"',
    )
    assert cloud.link.up_mbps == 50 and cloud.link.latency_ms == 7
    assert cloud.link.down_mbps == 2 * 754, "two streams of the route"
    assert cloud.compute is not None
    assert (cloud.compute.accelerators, cloud.compute.utilization) == (4, 0.5)
    assert cloud.prices.destination == "other-continent"
    assert cloud.prices.dollars(3600, 10**9) == pytest.approx(2 * 30 + 0.05)
    assert cloud.availability == Failures(9000.0, 1000.0, 5, "eu")
    assert (cloud.link.seed, cloud.link.cloud) == (5, "eu")


def test_machines_multiply_speed_and_rent(tmp_path: Path):
    cloud = profile(tmp_path, 'instance = "aws-g5-12xlarge"\nprices = { machines = 3 }')
    assert cloud.compute is not None and cloud.compute.accelerators == 12
    assert cloud.prices.dollars(3600, 0) == pytest.approx(3 * 5.672)


def test_traces_are_found_beside_the_run_file_and_survive_writing_it(tmp_path: Path):
    (tmp_path / "up.csv").write_text("seconds,mbps\n0,10\n60,20\n")
    (tmp_path / "alive.csv").write_text("seconds,up\n0,1\n50,0\n")
    (tmp_path / "mine.toml").write_text("[instances.aws-g5-xlarge]\ndollars_per_hour = 0.5\n")
    first = load(
        tmp_path,
        """instance = "aws-g5-xlarge"
        link = { up_trace = "up.csv", down_schedule = [[0, 8], [10, 4.5]], period_s = 120 }
        availability = { trace = "alive.csv", period_s = 100 }""",
        'catalogue = "mine.toml"',
    )
    assert first.catalogue == str(tmp_path / "mine.toml")
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "copy.toml"
    copy.write_text(runfile.to_toml(first))
    second = runfile.load(copy)
    assert second == first
    cloud = cloud_profiles.profiles(second)[0]
    assert cloud.link.up_rate == Rate((0.0, 60.0), (10.0, 20.0), 120.0)
    assert cloud.link.down_rate == Rate((0.0, 10.0), (8.0, 4.5), 120.0)
    assert cloud.availability == Trace((0.0, 50.0), (True, False), 100.0)
    assert cloud.prices.dollars_per_hour == 0.5


def test_a_model_makes_a_speed_of_flops(tmp_path: Path):
    run_file = load(tmp_path, "compute = { peak_tflops = 2, utilization = 0.5 }")
    config = DecoderConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=16,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
    )
    # By hand: q 8 x 8, k and v 8 x 4, o 8 x 8, gate, up and down 8 x 16; the head 100 x 8; rank 8
    # adapters on q and v.
    matrices = 3 * (64 + 32 + 32 + 64 + 3 * 128) + 800
    adapter = 3 * 8 * (16 + 12)
    flops = training_flops(matrices, adapter=adapter, layers=3, width=8, length=256)
    eu, us = cloud_profiles.profiles(run_file, config)
    assert eu.compute is not None and eu.compute.speed == pytest.approx(1e12 / flops)
    assert us.compute is None


@pytest.mark.parametrize(
    ("cloud", "top", "expected"),
    [
        (
            'instance = "aws-p5-48xlrge"',
            "",
            "q.toml:7: cloud \"eu\": unknown instance 'aws-p5-48xlrge'; did you mean "
            "'aws-p5-48xlarge'?",
        ),
        ('region = "aws-us-east1"\nlink = { up_mbps = 1, down_mbps = 1 }', "", "unknown region"),
        ("", 'server_region = "mars"', "unknown region 'mars'; `fedjax-llm clouds` lists them"),
        (
            'region = "aws-us-east-1"',
            "",
            "region says nothing about the link's up_mbps without server_region; set one of them",
        ),
        (
            'region = "azure-eastus"',
            'server_region = "gcp-us-east4"',
            "no route between azure-eastus and gcp-us-east4; give the link's up_mbps",
        ),
        (
            'instance = "aws-g5-xlarge"\nregion = "gcp-us-east4"\n'
            "link = { up_mbps = 1, down_mbps = 1 }",
            "",
            "instance 'aws-g5-xlarge' is one of aws, and the region is one of gcp",
        ),
        (
            "compute = { tokens_per_second = 5, peak_tflops = 2 }",
            "",
            "q.toml:10: [clouds.eu] compute.peak_tflops does not go together with "
            "tokens_per_second; remove one",
        ),
        (
            "compute = { memory_gib = 5 }",
            "",
            "compute needs tokens_per_second or peak_tflops, or an instance",
        ),
        (
            "compute = { peak_tflops = 2, utilization = 1.5 }",
            "",
            "q.toml:10: [clouds.eu] compute.utilization must be at most 1, got 1.5",
        ),
        (
            "link = { up_mbps = 0 }",
            "",
            "q.toml:10: [clouds.eu] link.up_mbps must be greater than 0, got 0",
        ),
        (
            "link = { loss = 1 }",
            "",
            "q.toml:10: [clouds.eu] link.loss must be less than 1, got 1",
        ),
        (
            'link = { up_mbps = 5, up_trace = "up.csv" }',
            "",
            "q.toml:10: [clouds.eu] link.up_trace does not go together with up_mbps; remove one",
        ),
        (
            "link = { up_mbps = 5, period_s = 9 }",
            "",
            "[clouds.eu] link.period_s goes with up_schedule or down_schedule or up_trace or "
            "down_trace; remove it",
        ),
        (
            "link = { up_schedule = [[0, 5], [9, 5], [8, 5]] }",
            "",
            'q.toml:7: cloud "eu": times must rise, got 8 after 9; sort them',
        ),
        ("link = { up_schedule = [[0, 5, 6]] }", "", "[clouds.eu] link.up_schedule"),
        (
            'link = { up_trace = "gone.csv" }',
            "",
            "q.toml:10: [clouds.eu] link.up_trace: there is no gone.csv",
        ),
        (
            'link = { up_trace = "back.csv" }',
            "",
            'q.toml:7: cloud "eu": back.csv:3: seconds must rise, got -3 after 0; sort the lines',
        ),
        (
            "availability = { mtbf_s = 0, mttr_s = 1 }",
            "",
            "q.toml:10: [clouds.eu] availability.mtbf_s must be greater than 0, got 0",
        ),
        ("availability = { mtbf_s = 5 }", "", "availability.mtbf_s goes with mttr_s; remove it"),
        (
            'availability = { mtbf_s = 5, mttr_s = 5, trace = "back.csv" }',
            "",
            "availability.mtbf_s does not go together with trace",
        ),
        ("availability = {}", "", "[clouds.eu] availability needs mtbf_s and mttr_s, or a trace"),
        (
            'prices = { destination = "moon" }',
            "",
            '[clouds.eu] prices.destination must be one of "same-region"',
        ),
        ("", 'catalogue = "gone.toml"', "q.toml:3: catalogue: there is no gone.toml"),
        ("", 'catalogue = "back.csv"', "q.toml:3: back.csv: not valid TOML"),
    ],
)
def test_profiles_that_contradict_themselves(tmp_path: Path, cloud, top, expected):
    (tmp_path / "back.csv").write_text("seconds,mbps\n0,5\n-3,5\n")
    assert expected in message(tmp_path, cloud, top)


def test_the_command_lists_machines_with_their_sources(tmp_path: Path, capsys):
    mine = tmp_path / "mine.toml"
    mine.write_text("[instances.aws-p5-48xlarge]\ndollars_per_hour = 31.25\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["clouds", "--catalogue", str(mine)])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("aws-p5-48xlarge")]
    assert "8 x NVIDIA H100 SXM" in line and "31.250" in line and "aws-prices" in line
    for name, source in cloud_profiles.load_catalogue().sources.items():
        assert any(row.startswith(name) and source.date in row for row in out.splitlines()), name
