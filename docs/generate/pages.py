"""Every generated page with its path: what `make results` writes, and what a test compares with what is there."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from generate import command_page, json_page, paper_page, parts, recipe_page, result_pages, tour_page
from generate.recorded import DOCS


@cache
def rendered() -> dict[Path, str]:
    """The text of every generated page, by its path."""
    pages = {
        **parts.filled(),
        DOCS / "paper.md": paper_page.page(),
        DOCS / "tour.md": tour_page.page(),
        DOCS / "reference/recipe.md": recipe_page.page(),
        DOCS / "reference/commands.md": command_page.page(),
        DOCS / "reference/json.md": json_page.page(),
    }
    return pages | {DOCS / path: text for path, text in result_pages.written().items()}
