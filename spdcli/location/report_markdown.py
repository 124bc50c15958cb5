"""The report on a run's facts as Markdown: the tables with what every row and column means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spdcli.edits.choices import STATISTICS
from spdcli.location.fact_edits import BASELINE, CONTROL, SLICES, SOUGHT
from spdcli.location.report_rows import TRACED, ZEROED

KINDS = {
    TRACED: "Causal tracing. In the clean run, the piece at the best site is replaced by that of the run whose "
    "subject is corrupted (mean over draws of the noise). It is no edit of the weights, so it says nothing about other "
    "prompts.",
    ZEROED: "A whole MLP layer writes nothing: layer 0, whose loss destroys the model, and the other layer that this "
    "answer needs most, of those that do not halve the answer of another prompt of the run (which would be "
    "destruction again).",
    SLICES: "The run's slices, suppressed in the original weights. *By rule* looks at no effect: the slices of "
    "{matrix} that are active at one single token of all the run's prompts, which is this prompt's and not its "
    "first; of those, the two of which W holds most, |ûᵀ W v̂|. *By effect*: of all slices of that MLP that are active "
    "in the prompt and at no first token, the one or two that lower the answer most while other prompts of the run "
    "change by less than 10 %. (First tokens are left out because every prompt parks attention there.)",
    BASELINE: "No decomposition is needed for these. *Static duals* are the slices of the same tokens (where "
    "the rule's slices are active, or the last two of the subject) that a dual "
    "start begins with (whitened: by the second moment of broad text); *direct* takes away all that the matrix does "
    "along C⁻¹x, x its inputs at the same tokens, C that second moment.",
    CONTROL: "Random rank-1 directions with the norm of the edit by rule, and the matrix's largest singular triple.",
    SOUGHT: "**Not evidence.** An edit found by optimising for the effect reaches nearly every fact in nearly every "
    "matrix: it bounds what an edit of this form can do, and says nothing about where a fact is stored.",
}
COLUMNS = ("", "this fact", "other prompts", "known facts: median", "mean", "max")


def percent(value: float | None) -> str:
    """A change, with its sign."""
    return "–" if value is None else f"{value:+.1%}"


def size(value: float | None) -> str:
    """The size of a change."""
    return "–" if value is None else f"{abs(value):.1%}"


def cells(row: Mapping[str, Any], intervals: bool = False) -> list[str]:
    """One row of the table; with `intervals` those of the known facts stand beside their statistics."""
    show = size if row.get("sizes") else percent
    found = [row["name"], show(row["own"]), show(row["others"])]
    facts = row["facts"]
    for name in STATISTICS:
        value = None if facts is None else facts.relative_change[name]
        bounds = facts.interval[name] if intervals and facts is not None and facts.interval else None
        found.append(size(value) + (f" ({bounds[0]:.1%} to {bounds[1]:.1%})" if bounds else ""))
    return found


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; every column but the first is right-aligned."""
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(['---', *['---:'] * (len(heads) - 1)])}|"]
    return [*lines, *(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows), ""]


def leak_rows(entry: Mapping[str, Any]) -> list[list[str]]:
    """The related prompts of one fact: what is left of the answer after each edit."""
    rows = []
    for one in entry["related"]:
        changes = [percent(edit["ratio"] - 1) for edit in one["edits"].values()]
        rows.append([one["kind"], one["prompt"], f"{one['before']:.4f}", *changes])
    return rows


def leak_heads(entry: Mapping[str, Any]) -> list[str]:
    """The columns of `leak_rows`."""
    names = {"rule": "slices, by rule", "effect": "slices, by effect", "direct": "direct C⁻¹x"}
    return ["", "prompt", "P before", *(names[edit] for edit in entry["related"][0]["edits"])]


def markdown(report: Mapping[str, Any], figures: Sequence[Path]) -> str:
    """The whole report, its `figures` beside it."""
    facts, settings = report["facts"], report["settings"]
    lines = [
        f"# Where is it? Facts of {report['run']}",
        "",
        "Changes are P(answer) after / before − 1. *This fact* is the prompt's own answer; *other prompts* the largest "
        "change among the run's other prompts; *known facts* sizes of change over the "
        f"{facts['known']} of {facts['asked']} other facts that the unchanged model knows, with 95 % bootstrap "
        "intervals. Side effects have heavy tails: read all three. Edits are of "
        f"`{report['matrix']}` where no other matrix is named.",
        "",
        f"Causal tracing: noise of {settings['noise']:g} standard deviations of the embeddings on the subject, "
        f"{settings['samples']} draws, windows of {settings['window']} of {settings['layers']} layers.",
        "",
    ]
    for entry in report["prompts"]:
        lines += fact_lines(entry)
    lines += ["## What the rows are", ""]
    for kind in dict.fromkeys(row["kind"] for entry in report["prompts"] for row in entry["rows"]):
        lines += [f"- {KINDS[kind].format(matrix='`' + report['matrix'] + '`')}"]
    lines += ["", "## Figures", ""]
    lines += [f"![{path.stem}]({path.name})\n" for path in figures if path.suffix == ".png"]
    return "\n".join(lines).rstrip() + "\n"


def fact_lines(entry: Mapping[str, Any]) -> list[str]:
    """One fact's tables."""
    rows = entry["rows"]
    evidence, sought = ([row for row in rows if (row["kind"] == SOUGHT) == flag] for flag in (False, True))
    lines = [f"## {entry['prompt']}", "", f"P({entry['answer']!r}) = {entry['before']:.4f}.", ""]
    for how, chosen in entry["chosen"].items():
        lines += [f"Slices, by {how}: {', '.join(f'`{one}`' for one in chosen) or 'none was found'}.", ""]
    lines += table(COLUMNS, (cells(row, intervals=True) for row in evidence))
    lines += ["Sought for the effect, and no evidence of a place:", ""]
    lines += table(COLUMNS, (cells(row, intervals=True) for row in sought))
    if not entry["related"]:
        return [*lines, "The facts file says this fact in no other words.", ""]
    lines += ["What leaks: the fact in other words, and asked in reverse.", ""]
    return lines + table(leak_heads(entry), leak_rows(entry))
