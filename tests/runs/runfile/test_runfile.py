"""Run files: every mistake is one line that names the place, the key and the cure."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.aggregation import RULES
from fedjax_llm.errors import FedJaxError, Refused, UserError
from fedjax_llm.runs import runfile
from fedjax_llm.runs.sections import clouds, training

GOOD = """\
name = "three"
rounds = 2

[model]
name = "smollm2-135m"

[adapter]
rank = 4
targets = [
  "q_proj",  # a comment, with [brackets] and "quotes"
  "v_proj",
]

[training]
learning_rate = 1e-3

[privacy]
clip_norm = 1.0

[secure]
sum = "threshold"
threshold = 2

[[clouds]]
name = "medical"
link = { up_mbps = 50.0, down_mbps = 100.0 }
data.sources = ["builtin:medical"]

[[clouds]]
name = "finance"
[clouds.data]
sources = ["builtin:finance"]
eval_fraction = 0.2
"""


def message(tmp_path: Path, source: str, *overrides: str) -> str:
    path = tmp_path / "q.toml"
    path.write_text(source)
    with pytest.raises(FedJaxError) as caught:
        runfile.load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_defaults_and_types(tmp_path: Path) -> None:
    path = tmp_path / "q.toml"
    path.write_text(GOOD)
    run_file = runfile.load(path)
    assert run_file.adapter.targets == ("q_proj", "v_proj")
    assert [cloud.name for cloud in run_file.clouds] == ["medical", "finance"]
    assert run_file.clouds[1].link == runfile.Link()
    assert run_file.training.clients_at_once == "auto"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "learning_rate",
            "learning_rat",
            "q.toml:15: unknown key [training] learning_rat; did you mean learning_rate?",
        ),
        (
            "[training]",
            "[traning]",
            "q.toml:14: unknown section [traning]; did you mean [training]?",
        ),
        (
            "learning_rate = 1e-3",
            "rank = 3",
            "q.toml:15: unknown key [training] rank; did you mean [adapter] rank?",
        ),
        (
            "up_mbps",
            "up_mpbs",
            "q.toml:26: unknown key [clouds.medical] link.up_mpbs; did you mean up_mbps?",
        ),
        ("rank = 4", 'rank = "4"', 'q.toml:8: [adapter] rank must be an integer, got "4"'),
        ("rank = 4", "rank = 4.5", "q.toml:8: [adapter] rank must be an integer, got 4.5"),
        ("rank = 4", "rank = true", "q.toml:8: [adapter] rank must be an integer, got true"),
        ("rank = 4", "rank = 0", "q.toml:8: [adapter] rank must be at least 1, got 0"),
        (
            '"v_proj"',
            "3",
            'q.toml:11: [adapter] targets.1 must be a string in quotes, as "this", got 3',
        ),
        ("= 1.0", "= 0", "q.toml:18: [privacy] clip_norm must be greater than 0, got 0"),
        ("= 1.0", "= nan", "q.toml:18: [privacy] clip_norm must be a finite number, got nan"),
        ("rounds = 2", "", "q.toml: the key rounds is missing"),
        ("rounds = 2", "rounds = ", "q.toml:2: not valid TOML: invalid value"),
        ('name = "finance"', "", "q.toml:29: the key [clouds.1] name is missing"),
        (
            'name = "smollm2-135m"',
            "",
            "q.toml:4: [model] takes either name or path, neither given",
        ),
        (
            '"threshold"',
            '"treshold"',
            'q.toml:21: [secure] sum must be one of "plain", "masked", "threshold", "bfv", "ckks", '
            'got "treshold"; did you mean "threshold"?',
        ),
        (
            'name = "finance"',
            'name = "medical"',
            'q.toml:30: [clouds.medical] name must be unique among the clouds, got "medical"',
        ),
        (
            "threshold = 2",
            "threshold = 3",
            "q.toml:22: [secure] threshold must be between 2 and 2, the number of clouds, got 3",
        ),
        (
            "[privacy]",
            '[aggregation]\nrule = "median"\n[privacy]',
            'q.toml:18: [aggregation] rule says what is trained, and "median" combines messages; '
            'write combine = "median" beside rule = "ffa"',
        ),
        (
            "[privacy]",
            '[aggregation]\nrule = "fedsdv"\n[privacy]',
            "q.toml:18: [aggregation] rule must be one of "
            + ", ".join(f'"{name}"' for name in RULES)
            + ', got "fedsdv"; did you mean "fedsvd"?',
        ),
        (
            "[privacy]",
            '[aggregation]\ncombine = "krum"\n[privacy]',
            "q.toml:18: [aggregation] combine has to read the message of each cloud, which "
            '[secure] sum = "threshold" hides; set groups, use combine = "normalised", or '
            'sum = "plain", got "krum"',
        ),
        (
            "[privacy]",
            "[aggregation]\ngroups = 2\n[privacy]",
            'q.toml:18: [aggregation] groups goes with a robust combine, not with "mean"; '
            "name one, or remove it, got 2",
        ),
        (
            "[privacy]",
            '[aggregation]\nexchange = "gradients"\n[privacy]',
            "q.toml:18: [aggregation] exchange sends the gradient of each step, and [training] "
            "local_steps is 4; set local_steps = 1",
        ),
        (
            "[privacy]",
            '[attack]\nname = "sign-flip"\nclouds = ["nobody"]\n[privacy]',
            'q.toml:19: [attack] clouds.0 must be one of medical, finance, got "nobody"',
        ),
        (
            'name = "finance"',
            'name = "finance"\nrank = 8',
            "q.toml:31: [clouds.finance] rank must be at most 4, [adapter] rank, got 8",
        ),
        (
            '["builtin:finance"]',
            '["missing.csv"]\nmapping = {prompt = "q", answer = "a"}',
            "q.toml:32: [clouds.finance] data.sources.0: there is no missing.csv",
        ),
        (
            '["builtin:finance"]',
            '["missing.csv"]',
            "q.toml:31: [clouds.finance] data needs a mapping from columns to prompt and answer, "
            'as mapping = {prompt = "question", answer = "answer"}',
        ),
        (
            "builtin:finance",
            "builtin:finace",
            "q.toml:32: [clouds.finance] data.sources.0 must be a file, a folder or one of "
            'builtin:medical, builtin:finance, builtin:general, got "builtin:finace"',
        ),
        (
            "rank = 4",
            "rank = 0\nalpha = 0",
            "q.toml:8: [adapter] rank must be at least 1, got 0 (and 1 more)",
        ),
    ],
)
def test_messages(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert message(tmp_path, GOOD.replace(old, new, 1)) == expected


@pytest.mark.parametrize("kind", ["masked", "threshold", "bfv", "ckks"])
def test_a_threshold_of_one_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "q.toml"
    path.write_text(GOOD.replace("threshold = 2", "threshold = 1"))
    with pytest.raises(Refused, match="every cloud could decrypt alone"):
        runfile.load(path, [f"secure.sum={kind}"])


def test_one_cloud_cannot_share_a_key(tmp_path: Path) -> None:
    alone = GOOD[: GOOD.rindex("[[clouds]]")]
    assert "needs at least 2 clouds to share the key" in message(tmp_path, alone)
    masked = "secure.sum=masked"
    assert "needs at least 2 clouds to mask each other" in message(tmp_path, alone, masked)


FIVE = GOOD + "".join(
    f'[[clouds]]\nname = "{name}"\ndata.sources = ["builtin:general"]\n' for name in "xyz"
)


def test_masks_need_more_than_half_of_the_clouds(tmp_path: Path) -> None:
    """Of five, two are enough to decrypt, and not to unmask."""
    expected = 'threshold must be between 3 and 5 with sum = "masked": two groups of half the'
    assert expected in message(tmp_path, FIVE, "secure.sum=masked")
    (tmp_path / "q.toml").write_text(FIVE)
    for settings in (["secure.sum=masked", "secure.threshold=3"], ["secure.sum=bfv"]):
        assert runfile.load(tmp_path / "q.toml", settings).secure.threshold in (2, 3)


def test_a_threshold_may_be_left_out_and_may_stay_beside_a_plain_sum(tmp_path: Path) -> None:
    path = tmp_path / "q.toml"
    path.write_text(GOOD.replace("threshold = 2\n", "\n"))
    assert runfile.load(path).secure.threshold is None
    path.write_text(GOOD)
    assert runfile.load(path, ["secure.sum=plain"]).secure.sum == "plain"


@pytest.mark.parametrize(("least", "error"), [(1, Refused), (3, UserError)])
def test_a_sum_of_too_few_or_of_more_clouds_than_there_are(
    tmp_path: Path, least: int, error: type[FedJaxError]
) -> None:
    (tmp_path / "q.toml").write_text(GOOD)
    with pytest.raises(error, match="minimum_clients must be between 2 and 2"):
        runfile.load(tmp_path / "q.toml", [f"secure.minimum_clients={least}"])


SELECTIVE = GOOD.replace("[privacy]", '[privacy]\nunit = "example"').replace(
    "[[clouds]]", '[secure.selective]\nlayers = ["*o_proj*"]\n[[clouds]]', 1
)
LINE = 'layers = ["*o_proj*"]'


def test_a_selective_sum_is_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "q.toml"
    (tmp_path / "map.npy").write_bytes(b"")
    for new in (
        LINE,
        'fraction = 0.3\nmap = "map.npy"',
        'fraction = 0.3\nmeasure_on = ["builtin:general", "builtin:finance"]\nmeasure_rows = 8',
        'fraction = 0.3\nmeasure_on = ["."]\nmapping = {prompt = "a", answer = "b"}',
    ):
        path.write_text(SELECTIVE.replace(LINE, new))
        run_file = runfile.load(path)
        selective = run_file.secure.selective
        assert selective is not None
        assert selective.map in (None, str(tmp_path / "map.npy"))
        assert "." not in (selective.measure_on or ())
        (tmp_path / "run.toml").write_text(runfile.to_toml(run_file))
        assert runfile.load(tmp_path / "run.toml") == run_file


@pytest.mark.parametrize(
    ("new", "overrides", "expected"),
    [
        ("", (), "q.toml:25: [secure.selective] takes either layers or fraction, neither given"),
        (
            f"{LINE}\nfraction = 0.5",
            (),
            "q.toml:25: [secure.selective] takes either layers or fraction, both given",
        ),
        (
            f'{LINE}\nmap = "m.npy"',
            (),
            "q.toml:27: [secure] selective.map goes with fraction, not with layers; remove it",
        ),
        (
            "fraction = 0.5",
            (),
            "q.toml:25: [secure.selective] fraction needs either map, a file, or measure_on, "
            "public text; neither given",
        ),
        (
            'fraction = 0.5\nmap = "m.npy"\nmeasure_on = ["builtin:general"]',
            (),
            "q.toml:25: [secure.selective] fraction needs either map, a file, or measure_on, "
            "public text; both given",
        ),
        (
            'fraction = 0.5\nmap = "m.csv"',
            (),
            "q.toml:27: [secure] selective.map must be a file in .npy or .safetensors format, "
            'got "m.csv"',
        ),
        (
            'fraction = 0.5\nmap = "m.npy"',
            (),
            "q.toml:27: [secure] selective.map: there is no m.npy",
        ),
        (
            'fraction = 0.5\nmeasure_on = ["builtin:genral"]',
            (),
            "q.toml:27: [secure] selective.measure_on.0 must be a file, a folder or one of "
            'builtin:medical, builtin:finance, builtin:general, got "builtin:genral"',
        ),
        (
            'fraction = 0.5\nmeasure_on = ["rows.csv"]',
            (),
            "q.toml:25: [secure] selective needs a mapping from columns to prompt and answer, "
            'as mapping = {prompt = "question", answer = "answer"}',
        ),
        (
            "fraction = 1.0",
            (),
            "q.toml:26: [secure] selective.fraction must be less than 1, got 1.0",
        ),
        (
            LINE,
            ("secure.sum=plain",),
            'q.toml:25: [secure] selective means nothing with sum = "plain", which encrypts '
            "nothing; remove it",
        ),
        (
            LINE,
            ("privacy.unit=none",),
            'q.toml:25: [secure] selective needs [privacy] unit = "example" or "user", got "none": '
            "without noise the server would read exact values in what stays in the clear",
        ),
        (
            LINE,
            ("privacy.unit=client",),
            "q.toml:25: [secure] selective needs [privacy] unit = "
            '"example" or "user", got "client": '
            "the noise of unit client is added after the sum, so that the server would read exact "
            "values in what stays in the clear",
        ),
        (
            LINE,
            ("privacy.noise_multiplier=0.0",),
            "q.toml:25: [secure] selective needs [privacy] noise_multiplier above 0: what stays "
            "in the clear has no other cover",
        ),
    ],
)
def test_selective_messages(
    tmp_path: Path, new: str, overrides: tuple[str, ...], expected: str
) -> None:
    assert message(tmp_path, SELECTIVE.replace(LINE, new), *overrides) == expected


@pytest.mark.parametrize("public", ["data/rows.jsonl", "data", "."])
def test_a_map_is_not_measured_on_a_clouds_own_files(tmp_path: Path, public: str) -> None:
    """Nor in a folder that holds them, nor on one of the files of a cloud's folder."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}")
    mapping = 'mapping = {prompt = "a", answer = "b"}'
    text = SELECTIVE.replace(LINE, f'fraction = 0.5\nmeasure_on = ["{public}"]\n{mapping}')
    for own in ("data", "data/rows.jsonl"):
        source = text.replace('["builtin:finance"]', f'["{own}"]\n{mapping}')
        (tmp_path / "q.toml").write_text(source)
        with pytest.raises(Refused, match='must be public text, and cloud "finance" trains on it'):
            runfile.load(tmp_path / "q.toml")


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        runfile.load(tmp_path / "nope.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        runfile.load(tmp_path / "binary.toml")


def test_paths_come_out_absolute_from_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "q.toml"
    text = GOOD.replace("builtin:medical", "../data").replace(
        'name = "smollm2-135m"', 'path = "../model"'
    )
    path.write_text(
        text.replace("data.sources", 'data.mapping = {prompt = "a", answer = "b"}\ndata.sources')
    )
    run_file = runfile.load(path)
    assert run_file.model.path == str(tmp_path / "model")
    assert run_file.clouds[0].data.sources == (str(tmp_path / "data"),)
    # What is resolved can be written anywhere.
    (tmp_path / "run.toml").write_text(runfile.to_toml(run_file))
    assert runfile.load(tmp_path / "run.toml") == run_file


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "seed=3",
            "training.clients_at_once=2",
            "secure.bits=16",
            "evaluation.prompt=Why is it so?",
        ),
        ("clouds.finance.data.limit=7", "adapter.targets=['all-linear']", "privacy.delta=1e-7"),
    ],
)
def test_the_resolved_file_loads_back_equal(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    (tmp_path / "q.toml").write_text(GOOD)
    run_file = runfile.load(tmp_path / "q.toml", overrides)
    (tmp_path / "run.toml").write_text(runfile.to_toml(run_file))
    assert runfile.load(tmp_path / "run.toml") == run_file


def test_overrides(tmp_path: Path) -> None:
    (tmp_path / "q.toml").write_text(GOOD)
    run_file = runfile.load(
        tmp_path / "q.toml",
        ["clouds.0.link.up_mbps=5", "clouds.finance.link.latency_ms=1.5", "privacy.unit=client"],
    )
    assert run_file.clouds[0].link.up_mbps == 5
    assert run_file.clouds[1].link.latency_ms == 1.5
    assert run_file.privacy.unit == "client"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "training.learning_rat=1",
            "unknown key [training] learning_rat; did you mean learning_rate?",
        ),
        ("trainig.learning_rate=1", "unknown section [trainig]; did you mean [training]?"),
        ("privacy.clip_norm=0", "[privacy] clip_norm must be greater than 0, got 0"),
        ("clouds.medcal.link.up_mbps=5", "no cloud medcal; did you mean medical?"),
        ("clouds.7.link.up_mbps=5", "no cloud 7; there are medical, finance"),
        ("rounds", "write it as section.key=value"),
        ("rounds.x=1", "rounds is a value, not a section"),
        ("rounds=[1", "the value is not TOML: Unclosed array"),
        ("rounds=1\nseed=2", 'rounds must be an integer, got "1\\nseed=2"'),
        ("model.path=/nope", "[model] takes either name or path, both given"),
    ],
)
def test_override_messages(tmp_path: Path, override: str, expected: str) -> None:
    path = tmp_path / "q.toml"
    path.write_text(GOOD)
    with pytest.raises(UserError) as caught:
        runfile.load(path, [override])
    assert str(caught.value).endswith(expected)
    if "model.path" not in override:
        assert str(caught.value).startswith(f"--set {override}: ")


def test_objects_are_frozen_and_checked_from_python_too() -> None:
    cloud = clouds.Cloud(name="a", data=clouds.DataSection(sources=("builtin:medical",)))
    run_file = runfile.RunFile(
        name="x", rounds=1, model=training.ModelSection(name="m"), clouds=(cloud,)
    )
    with pytest.raises(ValueError, match="frozen"):
        run_file.rounds = 2  # type: ignore[misc]
    with pytest.raises(ValueError, match="unique among the clouds"):
        runfile.RunFile(
            name="x", rounds=1, model=training.ModelSection(name="m"), clouds=(cloud, cloud)
        )


def test_the_quickstart_is_a_valid_run_file() -> None:
    root = Path(__file__).resolve().parents[3]
    run_file = runfile.load(root / "experiments" / "quickstart" / "quickstart.toml")
    assert [cloud.name for cloud in run_file.clouds] == ["medical", "finance", "general"]
    assert run_file.secure.sum == "threshold"


@given(st.text(max_size=30))
def test_any_override_is_a_value_or_a_user_error(override: str) -> None:
    root = Path(__file__).resolve().parents[3]
    try:
        runfile.load(root / "experiments" / "quickstart" / "quickstart.toml", [override])
    except FedJaxError:
        return
