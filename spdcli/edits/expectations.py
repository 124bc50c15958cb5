"""What the edits of a script do, held against what the script expects of them.

What can be expected of a prompt's answer (or another token) and of the known facts stands in `choices.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from spdcli.edits.answer_changes import AnswerChanges, measure_edits
from spdcli.edits.choices import ANSWER_MEASURES
from spdcli.edits.collateral import Collateral, collateral
from spdcli.edits.edit_reports import SuppressionReport
from spdcli.edits.editing_scores import EditingScores
from spdcli.edits.exam import Exam, Expectation
from spdcli.edits.script import Expect
from spdcli.edits.script_plan import ScriptPlan
from spdcli.edits.suppression import Edit, MatrixCut, describe
from spdcli.edits.text_changes import TextChange
from spdcli.engine.subcomponents import Decomposition
from spdcli.progress import Report, silent
from spdcli.records import ABSENT, Absent
from spdcli.runs.subject import Subject


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """One edit of a script; what is measured is ABSENT in a dry run.

    `effects` are those on the run's own prompts, then on the script's, then on the facts; `facts` is their summary
    without the run's own prompts. `scores` are as in `exam.ChangeReport`; the edited prompts are those of the run that
    the slices were selected in, or are active in. `text` is what becomes of the exam's text, where it has one.
    """

    name: str
    slices: list[str]
    together: str
    matrices: Sequence[MatrixCut] | Absent = ABSENT
    effects: AnswerChanges | Absent = ABSENT
    facts: Collateral | Absent | None = ABSENT
    expectations: Sequence[Expectation] | Absent = ABSENT
    scores: Mapping[str, EditingScores] | Absent = ABSENT
    text: TextChange | Absent = ABSENT


@dataclass(frozen=True, kw_only=True)
class ScriptReport(SuppressionReport):
    """What a script's `edits` do, each from the original weights (`spd.suppress/1` of several edits).

    What belongs to one edit alone stands at the top when there is only one. Every effect names its edit.
    """

    edits: Sequence[EditResult]


def report_plan(plan: ScriptPlan) -> ScriptReport:
    """A dry run: the slices of every edit, and the expectations unmeasured."""
    results = [
        EditResult(name=edit.name, slices=[str(address) for address in slices], together=edit.together)
        for edit, slices in zip(plan.script.edit, plan.slices, strict=True)
    ]
    return _whole(results, plan.expectations())


def report_script(
    subject: Subject,
    decomposition: Decomposition,
    plan: ScriptPlan,
    edits: Mapping[str, Edit],
    exam: Exam,
    report: Report = silent,
) -> ScriptReport:
    """What a script's `edits`, by name, do to an exam, that of `script_exam`.

    The run's own prompts are among its facts, if these have them, for expectations of all facts.
    """
    facts = exam.facts
    on_questions = measure_edits(subject.target, exam.questions, edits, report)
    on_facts = measure_edits(subject.target, facts.questions, edits, report) if facts is not None else {}
    on_text = exam.on_text(subject.target, edits, report)
    results = []
    for edit, slices, rows, edited in zip(plan.script.edit, plan.slices, plan.rows, plan.edited, strict=True):
        effects = on_questions[edit.name]
        of_facts = facts.marked(on_facts[edit.name]) if facts is not None else []
        summaries = _summaries(of_facts, subject, exam.seed) if facts is not None else {}
        verdicts = []
        for expect, row in zip(edit.expect, rows, strict=True):
            value = _value(expect, row, effects, summaries, on_text.get(edit.name))
            verdicts.append(replace(plan.expectation(edit, expect, row), passed=expect.holds(value), value=value))
        results.append(
            EditResult(
                name=edit.name,
                slices=[str(address) for address in slices],
                together=edit.together,
                matrices=describe(subject.target, decomposition, slices, edits[edit.name]),
                effects=effects + of_facts,
                facts=summaries.get("others"),
                expectations=verdicts,
                scores=exam.scores(subject, edits[edit.name], effects[: len(edited)], of_facts, edited, report),
                text=on_text.get(edit.name, ABSENT),
            )
        )
    return _whole(results, [one for result in results for one in result.expectations or ()])


def _summaries(of_facts: AnswerChanges, subject: Subject, seed: int) -> dict[str, Collateral]:
    own = subject.prompts.texts if subject.prompts is not None else []
    others = [effect for effect in of_facts if effect.prompt not in own]
    return {"all": collateral(of_facts, seed), "others": collateral(others, seed)}


def _value(
    expect: Expect,
    row: int | None,
    effects: AnswerChanges,
    summaries: Mapping[str, Collateral],
    text: TextChange | None,
) -> float | None:
    if row is not None:
        value: float = ANSWER_MEASURES[expect.measure].of(effects[row])
        return value
    if expect.text is not None:
        return None if text is None else getattr(text, expect.measure)
    assert expect.facts is not None
    return summaries[expect.facts].relative_change[expect.measure] if summaries else None


def _whole(results: Sequence[EditResult], expectations: Sequence[Expectation]) -> ScriptReport:
    only = results[0] if len(results) == 1 else None
    return ScriptReport(
        slices=list(dict.fromkeys(address for result in results for address in result.slices)),
        together=only.together if only else None,
        matrices=(only.matrices or []) if only else [],
        effects=[replace(effect, edit=result.name) for result in results for effect in result.effects or ()],
        alone={},
        facts=(only.facts or None) if only else None,
        scores=only.scores if only else ABSENT,
        text=only.text if only else ABSENT,
        edits=results,
        expectations=expectations,
    )
