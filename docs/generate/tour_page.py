"""The tour as a page: the cells of `docs/tour.ipynb`, which a test runs."""

from __future__ import annotations

import json
from typing import NamedTuple

from generate.markdown import fenced, joined
from generate.recorded import DOCS

NOTEBOOK = DOCS / "tour.ipynb"
NOTE = "<!-- Generated from docs/tour.ipynb by `make results`. -->"


class Cell(NamedTuple):
    """One cell: `kind` is markdown or code."""

    kind: str
    source: str


def cells() -> list[Cell]:
    """The notebook's cells, in order."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [Cell(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def page() -> str:
    """The whole page."""
    parts = [fenced("python", cell.source) if cell.kind == "code" else cell.source for cell in cells()]
    return joined([NOTE, *parts, "The notebook itself: [tour.ipynb](tour.ipynb)."]) + "\n"
