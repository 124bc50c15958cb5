"""The notebook: its cells run in order, and it is stored without output."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from generate.tour_page import NOTEBOOK, cells


def run_cell(source: str, names: dict[str, object]) -> object:
    """Runs a cell as a notebook does; what its last expression is, which a notebook would show."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if isinstance(last, ast.Expr) else None


def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    shown = [run_cell(cell.source, names) for cell in cells() if cell.kind == "code"]
    assert "6 matrices" in repr(shown[0])
    assert "active slices" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []  # all of it in memory


def test_it_is_a_notebook_without_output() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert [cell["id"] for cell in notebook["cells"]] == [f"cell-{n + 1}" for n in range(len(notebook["cells"]))]
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_a_cell_that_fails_is_noticed() -> None:
    assert run_cell("a = 1\na + 1", {}) == 2
    with pytest.raises(ZeroDivisionError):
        run_cell("1 / 0", {})
