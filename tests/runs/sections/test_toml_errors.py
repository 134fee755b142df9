"""Where each key of a run file stands: the line that an error names."""

import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.runs.sections import toml_errors


def test_lines_of_everything_toml_can_write() -> None:
    source = '''\
a.b = 1
"quoted key" = """
[not.a.table]
x = 1 """  # comment = 1
\'lit"eral\' = '\\'
list = [ # [
  {x = 1, y = [2,
     3]}, """a
]""", 2024-01-01,
]
[t."d.o.t"]
k = "\\"]"
[[s]]
x = 1
[[s.u]]
y = 1
[[s.u]]
y = 2
[[s]]
u.y = 3
'''
    tomllib.loads(source)
    lines = toml_errors.key_lines(source)
    expected = {
        ("a", "b"): 1,
        ("quoted key",): 2,
        ('lit"eral',): 5,
        ("list",): 6,
        ("list", 0, "x"): 7,
        ("list", 0, "y", 1): 8,
        ("list", 1): 8,
        ("list", 2): 9,
        ("t", "d.o.t"): 11,
        ("t", "d.o.t", "k"): 12,
        ("s", 0, "x"): 14,
        ("s", 0, "u", 0, "y"): 16,
        ("s", 0, "u", 1, "y"): 18,
        ("s", 1): 19,
        ("s", 1, "u", "y"): 20,
    }
    assert {key: lines.get(key) for key in expected} == expected


SCALARS = st.one_of(st.integers(-5, 5), st.booleans(), st.text(max_size=6), st.floats(0, 1))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=4))
def test_the_scanner_finds_every_key_that_tomllib_finds(content: dict[str, Any]) -> None:
    import tomli_w

    source = tomli_w.dumps(content)
    lines = toml_errors.key_lines(source)
    count = source.count("\n") + 1

    def check(value: Any, path: tuple[Any, ...]) -> None:
        if path:
            assert 1 <= lines[path] <= count
        if isinstance(value, dict):
            for key, inner in value.items():
                check(inner, (*path, key))
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                check(inner, (*path, index))

    check(tomllib.loads(source), ())
