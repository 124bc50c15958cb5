"""The paper's page: every equation, algorithm, table, figure and claim with where it is, from `docs/paper_map.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache

from generate.markdown import code, joined, table
from generate.recorded import DOCS, results

MAP = DOCS / "paper_map.toml"
NOTE = "<!-- Generated from docs/paper_map.toml by `make results`. -->"
ABOUT = """\
*Decomposition of Small Transformer Models* (Christensen and Smith), piece by piece: the code, the command that runs it,
the recipe's keys that set it, and what was recorded. A test looks for every name below.
"""


@dataclass(frozen=True)
class Entry:
    """One piece of the paper: `code` is FILE or FILE:NAME, `results` names of `docs/results.toml`."""

    paper: str
    formula: str = ""
    code: tuple[str, ...] = ()
    recipe: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    note: str = ""


@cache
def entries() -> tuple[Entry, ...]:
    """The whole map, in the order of the page."""
    raw = tomllib.loads(MAP.read_text(encoding="utf-8"))["entry"]
    return tuple(
        Entry(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
        for entry in raw
    )


def page() -> str:
    """The whole page: one table for finding, then each entry."""
    return joined([NOTE, "# The paper, piece by piece", ABOUT, overview(), *map(section, entries())]) + "\n"


def overview() -> str:
    """A row an entry."""
    rows = []
    for entry in entries():
        rows.append([entry.paper, ", ".join(map(code, entry.code[:1])), ", ".join(map(code, entry.commands[:1]))])
    return table(["in the paper", "code", "command"], rows, words=3)


def section(entry: Entry) -> str:
    """One entry in full."""
    lines = [
        *(f"- code: {code(place)}" for place in entry.code),
        *(f"- recipe: [{code(key)}](reference/recipe.md)" for key in entry.recipe),
        *(f"- command: {code(command)}" for command in entry.commands),
        *(f"- result: [{results()[name].title}](results/{results()[name].page}.md#{name})" for name in entry.results),
    ]
    return joined([f"## {entry.paper}", code(entry.formula) if entry.formula else "", entry.note, "\n".join(lines)])
