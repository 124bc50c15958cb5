"""`spd suppress --script`: named edits from a file, held against what the file expects of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spdcli.commands.effect_tables import (
    effects_table,
    facts_tables,
    in_title,
    prompts_only,
    scores_tables,
    text_tables,
)
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.console import Console
    from spdcli.edits.exam import Expectation
    from spdcli.edits.expectations import ScriptReport
    from spdcli.edits.script import Script
    from spdcli.recipe.reading import Source


def check_script(path: Path, writes: str | None, no_facts: bool) -> tuple[Script, Source]:
    """The script at `path` and where its keys stand; RecipeError with every mistake.

    UsageError for options that a script cannot go with; `writes` is --save or --patch, if given.
    """
    from spdcli.edits.script import load_script

    script, source = load_script(path)
    if writes is not None and len(script.edit) > 1:
        raise UsageError(
            f"{writes} writes one edit, and {path} has {len(script.edit)}",
            "each is measured on its own, from the original weights; put one into a script of its own",
        )
    if no_facts and script.asks_facts:
        raise UsageError(f"--no-facts, but {path} expects something of facts", "leave --no-facts out")
    return script, source


def script_tables(report: ScriptReport, verbose: bool) -> list[RenderableType]:
    """The edits, what is expected of them and whether it holds; with `-v` every effect."""
    from rich.table import Table

    table = Table(title="Edits, each from the original weights")
    for name in ("edit", "slices", "removed"):
        table.add_column(name, justify="right" if name == "removed" else "left")
    for edit in report.edits:
        removed = ", ".join(f"{cut.removed:.2%}" for cut in edit.matrices or ())
        table.add_row(edit.name, "\n".join(edit.slices), removed)
    parts: list[RenderableType] = [table, *verdicts_table(report.expectations)]
    each = [(edit, edit.scores) for edit in report.edits if edit.scores]
    parts += scores_tables({f"{edit.name}, {source}": own for edit, scores in each for source, own in scores.items()})
    parts += text_tables({edit.name: edit.text for edit in report.edits})
    for edit in report.edits if verbose else ():
        if edit.effects:
            title = f"{edit.name}: suppressed {in_title(edit.slices)}"
            parts.append(effects_table(title, prompts_only(edit.effects)))
            parts += facts_tables(edit.facts or None, edit.effects, verbose)
    return parts


def verdicts_table(expectations: Sequence[Expectation]) -> list[RenderableType]:
    """A row an expectation."""
    from rich.table import Table

    if not expectations:
        return []
    table = Table(title="Expectations", expand=True)
    table.add_column("edit", no_wrap=True)
    table.add_column("expectation", ratio=1)
    for name in ("value", "bound", "passed"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in expectations:
        passed = {None: "", True: "yes", False: "NO"}[one.passed]
        value = "" if one.value is None else f"{one.value:.4g}"
        table.add_row(one.edit, one.name, value, one.bound, passed)
    return [table]


def verdict_lines(console: Console, expectations: Sequence[Expectation]) -> None:
    """With `-q`, a line an expectation: passed or failed, its edit, its name, value and bound, apart by tabs."""
    if console.quiet:
        for one in expectations:
            word = {None: "planned", True: "passed", False: "failed"}[one.passed]
            value = "" if one.value is None else f"{one.value:.6g}"
            console.result("\t".join([word, one.edit, one.name, value, one.bound]))
