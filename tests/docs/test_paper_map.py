"""The paper's map: every file, name, recipe key, command and result that it names is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from generate.paper_page import Entry, entries
from generate.recorded import results
from printed import ROOT, mistakes, recipe_keys

PIECES = [
    *(f"Equation {number}" for number in range(1, 7)),
    *(f"Algorithm {number}" for number in range(1, 4)),
    *(f"Table {number}" for number in range(1, 5)),
    *(f"Figure {number}" for number in (1, 2, 3, 4, 5, 6, 9, 10)),
]


@cache
def names(path: Path) -> set[str]:
    """What a Python file defines at its top, and its classes' methods as CLASS.METHOD."""
    defined = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        if isinstance(node, ast.ClassDef):
            defined |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
    return defined


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.paper)
def test_everything_an_entry_names_is_there(entry: Entry) -> None:
    assert entry.code
    for place in entry.code:
        file, _, name = place.partition(":")
        assert (ROOT / file).is_file(), file
        assert not name or name in names(ROOT / file), f"{file} defines no {name}"
    assert set(entry.recipe) <= recipe_keys()
    assert [problem for command in entry.commands for problem in mistakes(command)] == []
    assert set(entry.results) <= set(results())


def test_a_name_that_is_not_there_is_missed() -> None:
    assert "faithfulnes" not in names(ROOT / "spdcli/engine/losses.py")
    assert "Importances.forward" in names(ROOT / "spdcli/engine/importance.py")


@pytest.mark.parametrize("piece", PIECES)
def test_every_numbered_piece_of_the_paper_has_an_entry(piece: str) -> None:
    assert any(re.match(rf"{piece}\b", entry.paper) for entry in entries())


def test_what_has_no_number_of_its_own_has_an_entry_too() -> None:
    said = " ".join(entry.paper for entry in entries())
    for words in ("σ_H", "and 7", "and 8", "Figures 7 and 8", "96 active subcomponents"):
        assert words in said
