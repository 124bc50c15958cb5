"""Every command's table at 40, 80 and 120 columns, with and without colour: nothing is cut, broken or too wide.

The tables are those of `table_cases`, made of records with long names and numbers of every kind.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
from table_cases import CASES

from spdcli.console import Console

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
FRAME = re.compile("[\u2500-\u257f]")


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a command prints on a terminal of so many columns."""

    def show(case: str, columns: int, colour: bool = False) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("FORCE_COLOR" if not colour else "NO_COLOR", raising=False)
        monkeypatch.setenv("FORCE_COLOR" if colour else "NO_COLOR", "1")
        Console().show({}, *CASES[case]())
        return capsys.readouterr().out

    return show


def words_with_digits(text: str) -> Counter[str]:
    return Counter(word for word in FRAME.sub(" ", text).split() if any(map(str.isdigit, word)))


@pytest.mark.parametrize("columns", [40, 80, 120])
@pytest.mark.parametrize("case", CASES)
def test_tables_are_read_at_every_width(case: str, columns: int, printed) -> None:
    text = printed(case, columns)
    for line in text.splitlines():
        assert len(line) <= columns or len(line.split()) == 1, "only a word that is longer is wider"
    shown, whole = words_with_digits(text), words_with_digits(printed(case, 2000))
    assert not whole - shown, "cut or broken"
    assert set(shown) <= set(whole), "pieces of what was broken"
    coloured = printed(case, columns, colour=True)
    assert COLOUR.search(coloured) or case.startswith("recipe"), "all but plain lines have some"
    assert COLOUR.sub("", coloured) == text
