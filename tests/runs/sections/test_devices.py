"""`[devices] rows` of a run file: three words, and one line for any other."""

from pathlib import Path

import pytest

from fedjax_llm.errors import FedJaxError
from fedjax_llm.runs import runfile

HEAD = """\
name = "q"
rounds = 2
[model]
name = "smollm2-135m"
[devices]
{rows}
[[clouds]]
name = "eu"
data.sources = ["builtin:medical"]
"""


def load(tmp_path: Path, rows: str) -> runfile.RunFile:
    path = tmp_path / "q.toml"
    path.write_text(HEAD.format(rows=rows))
    return runfile.load(path)


@pytest.mark.parametrize("word", ["auto", "device", "host"])
def test_rows_are_where_the_run_file_says(tmp_path: Path, word: str):
    assert load(tmp_path, f'rows = "{word}"').devices.rows == word
    assert load(tmp_path, "").devices.rows == "auto"


def test_other_words_are_one_line(tmp_path: Path):
    with pytest.raises(FedJaxError) as caught:
        load(tmp_path, 'rows = "disk"')
    said = str(caught.value)
    assert "\n" not in said
    for word in ("rows", "disk", "device", "host", "auto"):
        assert word in said
