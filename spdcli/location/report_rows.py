"""The rows of a report: one intervention each, and how far it moves a fact, the other prompts and the known facts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from spdcli.edits.answer_changes import AnswerChanges
from spdcli.edits.choices import STATISTICS
from spdcli.edits.collateral import ChangeSizes
from spdcli.edits.known_facts import OtherFacts
from spdcli.edits.text_changes import TextChange
from spdcli.location.report_edits import RowEdits
from spdcli.location.tracing import Trace
from spdcli.records import ABSENT, Absent

TRACED, ZEROED = "traced", "zeroed"
SITES = {"state": "hidden state", "mlp": "MLPs", "attention": "attention"}


@dataclass(frozen=True)
class ReportRow:
    """One row of a fact's table. Changes are after / before − 1 of P(answer).

    `own` is that of the prompt itself and `others` the largest of the run's other prompts; `facts` are sizes of change
    over the known facts. None is what was not measured. `sizes` is set where `own` and `others` are sizes, too: in a
    row that sums up several edits. `restores` is the effect of causal tracing at the row's site, `text` what becomes of
    a text under the one edit of the row.
    """

    name: str
    kind: str
    own: float | None
    others: float | None
    facts: ChangeSizes | None
    sizes: bool | Absent = ABSENT
    restores: float | Absent = ABSENT
    text: TextChange | Absent = ABSENT


def traced_rows(trace: Trace) -> list[ReportRow]:
    """What the corrupted piece of the best site of each kind does in the clean run.

    The best hidden state is one of the subject's tokens: after them, the last one always decides.
    """
    rows = []
    for kind, words in SITES.items():
        sites = [site for site in trace.best if site.kind == kind]
        best = sites[0] if kind == "state" else max(sites, key=lambda site: site.effect)
        first, last = best.layers
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        name = f"tracing: {words} at {trace.tokens[best.position]!r}, {layers}"
        own = best.reverse / trace.clean - 1
        rows.append(ReportRow(name, TRACED, own, None, None, restores=best.effect))
    return rows


def one_row(
    name: str, kind: str, on_prompts: AnswerChanges, on_facts: AnswerChanges | None, row: int, known: OtherFacts | None
) -> ReportRow:
    """The row of one intervention from the changes of the run's prompts, `row` its own, and of the known facts."""
    others = [change.ratio - 1 for number, change in enumerate(on_prompts) if number != row]
    sizes = None if known is None or on_facts is None else known.summary(on_facts, seed=0)
    return ReportRow(name, kind, on_prompts[row].ratio - 1, max(others, key=abs, default=None), sizes)


def edit_rows(
    row_edits: RowEdits,
    on_prompts: Mapping[str, AnswerChanges],
    on_facts: Mapping[str, AnswerChanges],
    row: int,
    known: OtherFacts | None,
    on_text: Mapping[str, TextChange],
) -> list[ReportRow]:
    """The row of one edit; of several, a row with their mean sizes of change and one with the largest of each."""
    rows = [
        one_row(row_edits.label, row_edits.kind, on_prompts[name], on_facts.get(name), row, known)
        for name in row_edits.edits
    ]
    if len(rows) == 1:
        (name,) = row_edits.edits
        return [replace(rows[0], text=on_text.get(name, ABSENT))]
    label = f"{row_edits.label}, {{}} of {len(rows)}"
    return [
        summed_up(label.format("mean size"), rows, statistics.fmean),
        summed_up(label.format("largest"), rows, max),
    ]


def summed_up(name: str, rows: Sequence[ReportRow], join: Callable[[Iterable[float]], float]) -> ReportRow:
    """One row for several: each number is `join` of the sizes of theirs; the facts' are without intervals."""

    def over(values: Iterable[float | None]) -> float | None:
        sizes = [abs(value) for value in values if value is not None]
        return join(sizes) if sizes else None

    changes = [row.facts.relative_change for row in rows if row.facts is not None]
    facts = {statistic: over(one[statistic] for one in changes) for statistic in STATISTICS}
    return ReportRow(
        name,
        rows[0].kind,
        own=over(row.own for row in rows),
        others=over(row.others for row in rows),
        facts=ChangeSizes(relative_change=facts) if changes else None,
        sizes=True,
    )
