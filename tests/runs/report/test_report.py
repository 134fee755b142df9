"""The report is one file that asks nothing of a network, and text in it stays text."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.runs import report
from fedjax_llm.runs.folder import RunFolder, metrics, summary
from fedjax_llm.runs.folder.metrics import CloudRecord, RoundRecord
from fedjax_llm.runs.report import compare

EVIL = '<script>alert("x")</script>'
RUN_TOML = """\
name = "quick"
seed = 7
rounds = {rounds}
[model]
name = "smollm2-135m"
[privacy]
unit = "example"
[[clouds]]
name = '{cloud}'
[[clouds]]
name = "$b$ & c"
"""


def make_run(
    path: Path,
    *,
    cloud: str = "a",
    rounds: int = 2,
    epsilon: float | None = 1.5,
    finished: bool = True,
    text: str = "an answer",
    encrypted: float | None = 1.0,
) -> RunFolder:
    with RunFolder.create(path, RUN_TOML.format(rounds=rounds, cloud=cloud)) as folder:
        for number in range(rounds + 1):
            clouds = {
                name: CloudRecord(
                    loss_eval_nats=2.5 - number / 10,
                    uplink_bytes=1_850_000 * bool(number),
                    downlink_bytes=700_000 * bool(number),
                )
                for name in (cloud, "$b$ & c")
            }
            record = RoundRecord(round=number, clouds=clouds)
            if number:
                record |= RoundRecord(
                    epsilon=epsilon, delta=1e-5, uplink_bytes=3_700_000, downlink_bytes=1_400_000
                )
                record |= RoundRecord(seconds_train=1.5, seconds_encrypt=0.25, seconds_round=2.0)
                if epsilon is None:
                    record["epsilon_reason"] = "no noise is added"
            metrics.append(folder.metrics, record)
        if finished:
            result = summary.summarise(
                metrics.read(folder.metrics),
                name="quick",
                seed=7,
                privacy_statement=text,
                secure_statement=text,
                sample=summary.Sample(text, text, text),
                parameters_trained=1234,
                encrypted_fraction=encrypted,
                versions={"jax": "0.12"},
                machine={"cores": 2},
            )
            folder.write("summary.json", result.to_json())
        return folder


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def parsed(html: str) -> Elements:
    elements = Elements()
    elements.feed(html)
    return elements


def test_it_is_self_contained(tmp_path: Path) -> None:
    path = report.write(make_run(tmp_path / "run"))
    html = path.read_text()
    elements = parsed(html)
    assert all(reference.startswith("#") for reference in elements.references)
    assert not {"script", "link", "iframe", "img", "object"} & set(elements.tags)
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(elements.ids) == len(set(elements.ids))
    assert elements.tags.count("svg") == 3


def test_a_model_given_by_its_folder_is_named_by_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    text = folder.run_toml.read_text().replace('name = "smollm2-135m"', 'path = "/models/mine"')
    folder.write("run.toml", text)
    assert "Federated fine-tuning · mine<" in report.render(folder)


def test_it_follows_light_and_dark(tmp_path: Path) -> None:
    html = report.render(make_run(tmp_path / "run"))
    assert "@media (prefers-color-scheme: dark)" in html
    charts = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    # Every colour of a chart is a variable that both schemes define.
    assert not re.search(r"#[0-9a-fA-F]{6}\b", charts)
    light, dark = html.split("prefers-color-scheme: dark")[0:2]
    for role in set(re.findall(r"var\(--([a-z0-9-]+)\)", html)) - {"sans", "mono"}:
        assert f"--{role}:" in light and f"--{role}:" in dark


def test_text_stays_text(tmp_path: Path) -> None:
    html = report.render(make_run(tmp_path / "run", cloud=EVIL, text=EVIL))
    assert "script" not in parsed(html).tags
    assert "&lt;script&gt;" in html
    assert "$b$ &amp; c" in html


def test_a_missing_epsilon_shows_its_reason(tmp_path: Path) -> None:
    html = report.render(make_run(tmp_path / "run", epsilon=None))
    assert "not certified" in html and "no noise is added" in html
    assert ">None<" not in html and "nan" not in html.lower().replace("finance", "")


def test_the_share_of_the_encrypted_sum_is_told(tmp_path: Path) -> None:
    html = report.render(make_run(tmp_path / "run"))
    assert "Encryption, addition and decryption took 12 % of it." in html
    rows = dict(compare.table([tmp_path / "run"]))
    assert rows["encryption, of the rounds"] == ["12 %"]


@pytest.mark.parametrize(
    ("encrypted", "words"),
    [
        (0.305, "exchanged, 30 % of them encrypted and the rest in the clear."),
        (0.0, "exchanged, none of them encrypted."),
        (1.0, "exchanged."),
        (None, "exchanged."),
    ],
)
def test_the_encrypted_part_is_told(tmp_path: Path, encrypted: float | None, words: str) -> None:
    html = report.render(make_run(tmp_path / "run", encrypted=encrypted))
    assert f"1,234 parameters were trained and {words}" in html


def test_an_unfinished_run_has_a_report_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=False)
    assert "This run has not ended:" in report.render(folder)
    folder.metrics.write_bytes(folder.metrics.read_bytes().splitlines(keepends=True)[0])
    assert "Nothing has been sent yet" in report.render(folder)
    folder.metrics.unlink()
    with pytest.raises(UserError, match="no finished round"):
        report.write(folder)
    assert not folder.report.exists()


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert report.render(folder) == report.render(folder)


def test_compare_shows_results_and_differing_keys(tmp_path: Path) -> None:
    for name, rounds in (("one", 1), ("two", 2)):
        make_run(tmp_path / name, rounds=rounds)
    rows = dict(compare.table([tmp_path / "one", tmp_path / "two"]))
    assert rows["loss a"] == ["2.5000 → 2.4000", "2.5000 → 2.3000"]
    assert rows["rounds"] == ["1", "2"]
    assert "seed" not in rows and "model.name" not in rows
    with pytest.raises(UserError, match="there is no run folder"):
        compare.table([tmp_path / "none"])
