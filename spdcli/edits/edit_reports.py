"""What edits of the original weights do: suppressed slices, and patches that go on or come off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spdcli.edits.answer_changes import measure_edits, with_active
from spdcli.edits.exam import ChangeReport, Exam
from spdcli.edits.patches import Patch, Weights, applied, negative, reverted
from spdcli.edits.suppression import Address, Edit, MatrixCut, describe, suppression
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Target
from spdcli.progress import Report, silent
from spdcli.records import ABSENT, Absent
from spdcli.runs.subject import Subject


@dataclass(frozen=True, kw_only=True)
class SuppressionReport(ChangeReport):
    """What the suppression of slices does: `together` in which form, how much of it (`strength`, 1 all; ABSENT of a
    script, whose edits have their own), and what it takes from every matrix."""

    together: str | None
    strength: float | Absent = ABSENT
    matrices: Sequence[MatrixCut]


@dataclass(frozen=True, kw_only=True)
class PatchReport(ChangeReport):
    """What a patch does; `action` is apply or revert."""

    action: str


def report_suppression(
    subject: Subject,
    decomposition: Decomposition,
    slices: Sequence[Address],
    together: str,
    exam: Exam,
    strength: float = 1.0,
    report: Report = silent,
) -> SuppressionReport:
    """What the suppression of `slices` does to an exam, all at once and each alone."""
    target = subject.target
    edits = {"": suppression(target, decomposition, slices, together, strength)}
    if len(slices) > 1:
        edits |= {str(one): suppression(target, decomposition, [one], together, strength) for one in slices}
    alone = measure_edits(target, exam.questions, edits, report)
    effects = with_active(subject, decomposition, exam.questions, slices, alone.pop(""))
    on_facts, facts = exam.on_facts(target, edits[""], report)
    own = [bool(effect.active) for effect in effects]
    return SuppressionReport(
        slices=[str(address) for address in slices],
        together=together,
        strength=strength,
        matrices=describe(target, decomposition, slices, edits[""]),
        effects=effects + on_facts,
        alone=alone,
        facts=facts,
        scores=exam.scores(subject, edits[""], effects, on_facts, own, report),
        text=exam.on_text(target, {"": edits[""]}, report).get("", ABSENT),
    )


def patch_target(target: Target, patch: Patch, path: Path, revert: bool = False) -> tuple[Edit, Weights]:
    """What the patch that was read from `path` does to the target, or what taking it off does: the edit, and the
    touched weights afterwards, bit for bit. The target is not changed.

    SpdError unless the target is the base that the patch needs.
    """
    if revert:
        undo = {name: negative(factors) for name, factors in patch.edit.items()}
        return undo, reverted(target, patch, path)
    return patch.edit, applied(target, patch, path)


def report_patch(
    subject: Subject, patch: Patch, edit: Edit, exam: Exam, revert: bool = False, report: Report = silent
) -> PatchReport:
    """What `edit`, that of a patch or its opposite, does to an exam."""
    effects = measure_edits(subject.target, exam.questions, {"": edit}, report)[""]
    on_facts, facts = exam.on_facts(subject.target, edit, report)
    return PatchReport(
        slices=patch.about["slices"],
        action="revert" if revert else "apply",
        effects=effects + on_facts,
        alone={},
        facts=facts,
        scores=exam.scores(subject, edit, effects, on_facts, report=report),
        text=exam.on_text(subject.target, {"": edit}, report).get("", ABSENT),
    )
