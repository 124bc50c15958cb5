"""`spd suppress --script`: named edits from a file, held against what the file expects of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdcli.commands.change import ask_facts, effects_table, facts_tables, listed, prompts_only
from spdcli.commands.suppressing import Change, Given, base_of
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.console import Console
    from spdcli.edits.answer_changes import AnswerChanges
    from spdcli.edits.expectations import Planned
    from spdcli.edits.script import Script
    from spdcli.recipe.reading import Source


@dataclass(frozen=True, eq=False)
class Written:
    """A script as it was read from `path`."""

    path: Path
    script: Script
    source: Source


def read_script(path: Path) -> Written:
    """The script at `path`; RecipeError with every mistake."""
    from spdcli.edits.script import load_script

    return Written(path, *load_script(path))


def check_script(written: Written, writes: str | None, no_facts: bool) -> None:
    """UsageError for options that a script cannot go with; `writes` is --save or --patch, if given."""
    edits = len(written.script.edit)
    if writes is not None and edits > 1:
        raise UsageError(
            f"{writes} writes one edit, and {written.path} has {edits}",
            "each is measured on its own, from the original weights; put one into a script of its own",
        )
    if no_facts and written.script.asks_facts:
        raise UsageError(f"--no-facts, but {written.path} expects something of facts", "leave --no-facts out")


def suppress_script(console: Console, given: Given, written: Written, dry_run: bool) -> Change:
    """The edits of a script on a run: measured, or with `dry_run` only found."""
    from spdcli.edits.expectations import measure_script, plan_script
    from spdcli.runs.loading import load

    loaded = load(given.run, given.device)
    console.debug(str(loaded))
    subject, decomposition, recipe = loaded.subject, loaded.decomposition, loaded.recipe
    seed = recipe.seed if given.seed is None else given.seed
    begin_token = recipe.data is not None and recipe.data.begin_token
    planned = plan_script(subject, decomposition, written.script, written.source, seed, begin_token)
    base = base_of(recipe, given.run)
    if dry_run:
        return Change(plan_report(planned), subject, base, {})
    facts = None  # the run's own prompts are among them, for expectations of all facts
    if written.script.asks_facts or given.facts_option is not None:
        facts = ask_facts(console, subject, recipe, given.facts, given.facts_option or "builtin", own=[])
    report, edits = measure_script(subject, decomposition, planned, facts, seed)
    return Change(full_report(report), subject, base, next(iter(edits.values())))


def plan_report(planned: Planned) -> dict[str, Any]:
    """What `--dry-run` tells: the slices of every edit and the expectations, unmeasured."""
    from spdcli.edits.expectations import promises

    edits = [
        {"name": edit.name, "slices": [str(address) for address in slices], "together": edit.together}
        for edit, slices in zip(planned.script.edit, planned.slices, strict=True)
    ]
    return whole(edits, promises(planned), [])


def full_report(report: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of a measured script: what each edit does, and all together in the shape of one suppression."""
    expectations = [one for entry in report for one in entry["expectations"]]
    effects = [replace(effect, edit=entry["name"]) for entry in report for effect in entry["effects"]]
    return whole(report, expectations, effects)


def whole(edits: list[dict[str, Any]], expectations: list[dict[str, Any]], effects: AnswerChanges) -> dict[str, Any]:
    """`spd.suppress/1` of several edits; what belongs to one edit alone stands at the top when there is only one."""
    only = edits[0] if len(edits) == 1 else {}
    return {
        "slices": list(dict.fromkeys(address for edit in edits for address in edit["slices"])),
        "together": only.get("together"),
        "matrices": only.get("matrices", []),
        "effects": effects,
        "alone": {},
        "facts": only.get("facts"),
        "edits": edits,
        "expectations": expectations,
    }


def render(data: dict[str, Any], verbose: bool) -> list[RenderableType]:
    """The edits, what is expected of them and whether it holds; with `-v` every effect."""
    from rich.table import Table

    table = Table(title="Edits, each from the original weights")
    for name in ("edit", "slices", "removed"):
        table.add_column(name, justify="right" if name == "removed" else "left")
    for edit in data["edits"]:
        removed = ", ".join(f"{cut.removed:.2%}" for cut in edit.get("matrices", ()))
        table.add_row(edit["name"], "\n".join(edit["slices"]), removed)
    parts: list[RenderableType] = [table, *verdicts_table(data["expectations"])]
    for edit in data["edits"] if verbose else ():
        if "effects" in edit:
            title = f"{edit['name']}: suppressed {listed(edit['slices'])}"
            parts.append(effects_table(title, prompts_only(edit["effects"])))
            parts += facts_tables(edit["facts"], edit["effects"], verbose)
    return parts


def verdicts_table(expectations: list[dict[str, Any]]) -> list[RenderableType]:
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
        passed = {None: "", True: "yes", False: "NO"}[one["passed"]]
        value = "" if one["value"] is None else f"{one['value']:.4g}"
        table.add_row(one["edit"], one["name"], value, one["bound"], passed)
    return [table]


def verdict_lines(console: Console, expectations: list[dict[str, Any]]) -> None:
    """With `-q`, a line an expectation: passed or failed, its edit, its name, value and bound, apart by tabs."""
    if console.quiet:
        for one in expectations:
            word = {None: "planned", True: "passed", False: "failed"}[one["passed"]]
            value = "" if one["value"] is None else f"{one['value']:.6g}"
            console.result("\t".join([word, one["edit"], one["name"], value, one["bound"]]))
