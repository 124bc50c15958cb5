"""The facts of a run's report as sections of its page: tables of edits, what leaks, figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spdcli.location.report import FactReport, RunReport
from spdcli.location.report_edits import SOUGHT
from spdcli.location.report_markdown import COLUMNS, KINDS, cells, leak_heads, leak_rows
from spdcli.page.content import Fact, Picture, Table

CHANGES = (
    "Changes are P(answer) after / before − 1. This fact is the prompt's own answer; other prompts, the largest "
    "change among the run's other prompts; known facts, sizes of change over {known} of {asked} other facts that the "
    "unchanged model knows, with 95 % bootstrap intervals. Side effects have heavy tails: read all three. Edits are of "
    "{matrix} where no other matrix is named."
)


def fact_sections(report: RunReport, figures: Sequence[Path]) -> list[Fact]:
    """A section a prompt, with those of `figures` that are of it."""
    return [section(fact, number, figures) for number, fact in enumerate(report.prompts, 1)]


def section(fact: FactReport, number: int, figures: Sequence[Path]) -> Fact:
    """The section of the prompt of a number, from 1."""
    evidence, sought = ([row for row in fact.rows if (row.kind == SOUGHT) == flag] for flag in (False, True))
    heads = ["edit, or intervention", *COLUMNS[1:]]
    tables = [
        Table("What cuts it, and what else that cuts", heads, [cells(row, intervals=True) for row in evidence]),
        Table("Sought for the effect: no evidence of a place", heads, [cells(row, intervals=True) for row in sought]),
    ]
    if fact.related:
        leaks = [[row[1], row[0], *row[2:]] for row in leak_rows(fact)]
        kinds, prompt, *others = leak_heads(fact)
        tables.append(Table("What leaks: in other words, and in reverse", [prompt, kinds or "kind", *others], leaks))
    chosen = {"rule": fact.chosen.rule, "effect": fact.chosen.effect}
    about = [f"P({fact.answer!r}) = {fact.before:.4f}."]
    about += [f"Slices, by {how}: {', '.join(slices) or 'none was found'}." for how, slices in chosen.items()]
    return Fact(fact.prompt, about, tables, pictures(fact, number, figures))


def pictures(fact: FactReport, number: int, figures: Sequence[Path]) -> list[Picture]:
    """The figures of a prompt's fact: the slices of its name (Figure 4), and causal tracing (Figures 7 and 8)."""
    best = max(fact.trace.best, key=lambda site: site.effect)
    said = {
        f"names-{number}": (
            "P(answer) as it is, without the slice of each part of the name, and without all of them.",
            ", ".join(f"{' and '.join(one.tokens)}: {one.ratio[number - 1]:.2f} of it is left" for one in fact.slices),
        ),
        f"trace-{number}": (
            "Causal tracing: P(answer) after restoring each place in a run whose subject is corrupted.",
            f"the largest effect, {best.effect:.3f}, is that of {best.kind} at {fact.tokens[best.position]!r}",
        ),
    }
    return [Picture(path, *said[path.stem]) for path in figures if path.suffix == ".svg" and path.stem in said]


def all_facts_pictures(report: RunReport, figures: Sequence[Path]) -> list[Picture]:
    """The figures of all facts together: Figures 3 and 9."""
    kept = [f"{fact.prompt}: {one.ratio[row]:.2f}" for row, fact in enumerate(report.prompts) for one in fact.slices]
    needed = {label: min(one.ratio for one in changes) for label, changes in report.mlp_zeroed.items()}
    worst = min(needed, key=lambda label: needed[label], default="")
    said = {
        "slices": (
            "P(answer), after / before, with slices suppressed: dark their own prompt, light the others.",
            "; ".join(kept),
        ),
        "mlp-zeroed": (
            "P(answer) with each MLP layer zeroed; the dashed line is the whole model's.",
            f"the most is lost without {worst}" if worst else "",
        ),
    }
    return [Picture(path, *said[path.stem]) for path in figures if path.suffix == ".svg" and path.stem in said]


def kinds_of_rows(report: RunReport) -> list[str]:
    """What the rows of the tables are, in plain text."""
    kinds = dict.fromkeys(row.kind for fact in report.prompts for row in fact.rows)
    said = [CHANGES.format(known=report.facts.known, asked=report.facts.asked, matrix=report.matrix)]
    return said + [KINDS[kind].format(matrix=report.matrix).replace("*", "") for kind in kinds]
