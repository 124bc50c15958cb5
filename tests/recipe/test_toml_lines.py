"""The line of every key, in documents made to confuse."""

from __future__ import annotations

from typing import Any

import pytest
import tomli
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from spdcli.recipe.toml_lines import KeyPath, key_lines, split_key

TRICKY = '''\
# [not.a.section]
a."b.c".d = """
[x]
y = 1"""
list = [
  "]", # ]
  """
  three
  lines\\"""", [1,
  2],
]
'literal key' = 'c:\\[x]'
[ s . t ]
when = 1979-05-27 07:32:00 # a date
inline = { p = 1, q = [ 1, { r = "}" } ] }
[[many]]
k = 1
[[many]]
k = 2
'''


def test_the_locator_is_not_confused() -> None:
    tomli.loads(TRICKY)
    lines = key_lines(TRICKY)
    assert lines[("a", "b.c", "d")] == 2
    assert lines[("a",)] == 2
    assert lines[("list",)] == 5
    assert [lines["list", index] for index in range(3)] == [6, 7, 9]
    assert lines["list", 2, 1] == 10
    assert lines[("literal key",)] == 12
    assert lines["s", "t"] == 13
    assert lines["s", "t", "when"] == 14
    assert lines["s", "t", "inline", "q", 1, "r"] == 15
    assert lines["many", 0, "k"] == 17
    assert lines["many", 1, "k"] == 19
    assert ("x",) not in lines
    assert ("not", "a", "section") not in lines
    assert key_lines(TRICKY.replace("\n", "\r\n")) == lines


def leaves(value: Any, path: KeyPath = ()) -> list[KeyPath]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [leaf for key, item in inner for leaf in leaves(item, (*path, key))]


scalars = st.one_of(
    st.integers(-5, 5), st.booleans(), st.floats(allow_nan=False), st.text("ab\"'\\[]{}=#\n\t,é", max_size=8)
)
documents = st.dictionaries(
    st.text("ab.-\"' #[=", min_size=1, max_size=4),
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("kx.", max_size=3), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(deadline=None)
@given(documents, st.booleans())
def test_every_key_of_any_document_has_a_line_that_rises(document: dict[str, Any], multiline: bool) -> None:
    text = tomli_w.dumps(document, multiline_strings=multiline)
    read = tomli.loads(text)
    lines = key_lines(text)
    assert set(leaves(read)) == set(lines)
    for path, line in lines.items():
        assert 1 <= line <= text.count("\n")
        assert not path[:-1] or lines[path[:-1]] <= line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.b", ("a", "b")),
        ('a . "b.c"', ("a", "b.c")),
        ("", None),
        ("a.", None),
        ("a b", None),
        ("a = 1\nb", None),
    ],
)
def test_a_dotted_key_is_split_or_refused(text: str, parts: KeyPath | None) -> None:
    assert split_key(text) == parts
