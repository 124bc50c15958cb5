"""The report on a run's facts as Markdown: the tables with what every row and column means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from spdcli.edits.choices import STATISTICS
from spdcli.engine.tables import GRADES
from spdcli.location.report import FactReport, ReportSettings, RunReport
from spdcli.location.report_edits import BASELINE, CONTROL, SLICES, SOUGHT
from spdcli.location.report_rows import TRACED, ZEROED, ReportRow
from spdcli.measures.evidence_choices import MASKS

KINDS = {
    TRACED: "Causal tracing. In the clean run, the piece at the best site is replaced by that of the run whose "
    "subject is corrupted (mean over draws of the noise). It is no edit of the weights, so it says nothing about other "
    "prompts.",
    ZEROED: "A whole MLP layer writes nothing: layer 0, whose loss destroys the model, and the other layer that this "
    "answer needs most, of those that do not halve the answer of another prompt of the run (which would be "
    "destruction again).",
    SLICES: "The run's slices, suppressed in the original weights. *By rule* looks at no effect: at each of the last "
    "two tokens of the subject (never the prompt's first), of the slices of {matrix} that are active there and in no "
    "other prompt of the run the one of which W holds most, |ûᵀ W v̂|. It may be active elsewhere in this prompt, too; "
    "what is active only at tokens that do not name the subject is not chosen, however special it is to them. "
    "*By effect*: of all slices of that MLP that are active in the prompt and at no first token, the one or two that "
    "lower the answer most while other prompts of the run change by less than 10 %. (First tokens are left out because "
    "every prompt parks attention there.)",
    BASELINE: "No decomposition is needed for these. *Static duals* are the slices of the same tokens (where the "
    "rule's slices are most important, or the last two of the subject) that a dual start begins with (whitened: by the "
    "second moment of broad text); *direct* takes away all that the matrix does along C⁻¹x, x its inputs at the same "
    "tokens, C that second moment.",
    CONTROL: "Random directions, as many as the rule has slices and with the norm of the edit by rule, and as many of "
    "the matrix's largest singular triples.",
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


def cells(row: ReportRow, intervals: bool = False) -> list[str]:
    """One row of the table; with `intervals` those of the known facts stand beside their statistics."""
    show = size if row.sizes else percent
    name = f"{row.name} (99 % of the text's tokens: KL below {row.text.kl_p99:.1e})" if row.text else row.name
    texts = [name, show(row.own), show(row.others)]
    facts = row.facts
    for name in STATISTICS:
        value = None if facts is None else facts.relative_change[name]
        bounds = facts.interval[name] if intervals and facts is not None and facts.interval else None
        texts.append(size(value) + (f" ({bounds[0]:.1%} to {bounds[1]:.1%})" if bounds else ""))
    return texts


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; every column but the first is right-aligned."""
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(['---', *['---:'] * (len(heads) - 1)])}|"]
    return [*lines, *(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows), ""]


def leak_rows(fact: FactReport) -> list[list[str]]:
    """The related prompts of one fact: what is left of the answer after each edit."""
    return [
        [one.kind, one.prompt, f"{one.before:.4f}", *(percent(leak.ratio - 1) for leak in one.edits.values())]
        for one in fact.related
    ]


def leak_heads(fact: FactReport) -> list[str]:
    """The columns of `leak_rows`."""
    names = {"rule": "slices, by rule", "effect": "slices, by effect", "direct": "direct C⁻¹x"}
    return ["", "prompt", "P before", *(names[edit] for edit in fact.related[0].edits)]


def markdown(run: str, report: RunReport, settings: ReportSettings, layers: int, figures: Sequence[Path]) -> str:
    """The whole report on `run`, whose target has `layers` blocks, with its `figures` beside it."""
    lines = [
        f"# Where is it? Facts of {run}",
        "",
        "Changes are P(answer) after / before − 1. *This fact* is the prompt's own answer; *other prompts* the largest "
        "change among the run's other prompts; *known facts* sizes of change over the "
        f"{report.facts.known} of {report.facts.asked} other facts that the unchanged model knows, with 95 % bootstrap "
        "intervals. Side effects have heavy tails: read all three. Edits are of "
        f"`{report.matrix}` where no other matrix is named.",
        "",
        f"Causal tracing: noise of {settings.trace.noise:g} standard deviations of the embeddings on the subject, "
        f"{settings.trace.samples} draws, windows of {settings.trace.window} of {layers} layers.",
        "",
    ]
    for fact in report.prompts:
        lines += fact_lines(fact)
    lines += evidence_lines(report)
    lines += ["## What the rows are", ""]
    for kind in dict.fromkeys(row.kind for fact in report.prompts for row in fact.rows):
        lines += [f"- {KINDS[kind].format(matrix='`' + report.matrix + '`')}"]
    lines += ["", "## Figures", ""]
    lines += [f"![{path.stem}]({path.name})\n" for path in figures if path.suffix == ".png"]
    return "\n".join(lines).rstrip() + "\n"


def evidence_lines(report: RunReport) -> list[str]:
    """What the model of masked slices is worth; the edits above are of the original weights and do not rest on it."""
    evidence = report.evidence
    if not evidence:
        return []
    answers = evidence.answers or {}
    rows = [
        [MASKS[name], GRADES[evidence.grades[name]].label, f"{kl:.2g}", *map("{:.3f}".format, answers.get(name, ()))]
        for name, kl in evidence.kl.items()
    ]
    heads = ("masks", "evidence", "KL", *(f"P({fact.answer!r})" for fact in report.prompts))
    width = len(heads)
    words = "The edits above are of the original weights. What the run's slices say as a model of their own:"
    return [
        "## Slices as a model",
        "",
        words,
        "",
        *table(heads, ([*row, *[""] * (width - len(row))] for row in rows)),
    ]


def fact_lines(fact: FactReport) -> list[str]:
    """One fact's tables."""
    evidence, sought = ([row for row in fact.rows if (row.kind == SOUGHT) == flag] for flag in (False, True))
    lines = [f"## {fact.prompt}", "", f"P({fact.answer!r}) = {fact.before:.4f}.", ""]
    for how, slices in (("rule", fact.chosen.rule), ("effect", fact.chosen.effect)):
        lines += [f"Slices, by {how}: {', '.join(f'`{one}`' for one in slices) or 'none was found'}.", ""]
    lines += table(COLUMNS, (cells(row, intervals=True) for row in evidence))
    lines += ["Sought for the effect, and no evidence of a place:", ""]
    lines += table(COLUMNS, (cells(row, intervals=True) for row in sought))
    if not fact.related:
        return [*lines, "The facts file says this fact in no other words.", ""]
    lines += ["What leaks: the fact in other words, and asked in reverse.", ""]
    return lines + table(leak_heads(fact), leak_rows(fact))
