"""How `spd suppress` comes to an edit: by slices, by a script or by a patch; and how it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdcli.commands.edit_options import ExamOptions
from spdcli.commands.effect_tables import prompts_only
from spdcli.commands.opening import opened
from spdcli.console import Console

if TYPE_CHECKING:
    from spdcli.edits.edit_reports import PatchReport, SuppressionReport
    from spdcli.edits.patches import Weights
    from spdcli.edits.script import Script
    from spdcli.edits.suppression import Edit
    from spdcli.recipe.reading import Source
    from spdcli.runs.subject import Subject

MEASURING = "measuring what the edit does"


@dataclass(frozen=True)
class RunOptions:
    """The run, and how it is opened and examined, as the options say it."""

    run: Path
    device: str | None
    seed: int | None
    exam: ExamOptions


@dataclass(frozen=True, eq=False)
class Outcome:
    """A change of a subject's target, measured: the report, the `edit`, and the weights after it where they are known.

    `base` is the directory that the target came from, which nothing may be written over.
    """

    report: SuppressionReport | PatchReport
    subject: Subject
    base: Path
    edit: Edit
    weights: Weights | None = None


def suppress_slices(
    console: Console, options: RunOptions, addresses: list[str], together: str, strength: float
) -> Outcome:
    """Suppress slices of a run by their addresses."""
    from spdcli.edits.checkpoints import base_of
    from spdcli.edits.edit_reports import report_suppression
    from spdcli.edits.suppression import find_slices, suppression

    loaded = opened(console, options.run, options.device)
    slices = find_slices(loaded.decomposition, addresses)
    exam = options.exam.open(console, loaded.recipe, loaded.subject, loaded.seed_or(options.seed), loaded.decomposition)
    with console.progress(MEASURING) as progress:
        report = report_suppression(loaded.subject, loaded.decomposition, slices, together, exam, strength, progress)
    edit = suppression(loaded.subject.target, loaded.decomposition, slices, together, strength)
    return Outcome(report, loaded.subject, base_of(loaded.recipe, options.run), edit)


def suppress_script(console: Console, options: RunOptions, sections: tuple[Script, Source], dry_run: bool) -> Outcome:
    """The edits of a script on a run: measured, or with `dry_run` only looked up."""
    from spdcli.edits.checkpoints import base_of
    from spdcli.edits.exam import script_exam
    from spdcli.edits.expectations import report_plan, report_script
    from spdcli.edits.script_plan import plan_script

    loaded = opened(console, options.run, options.device)
    subject, base, seed = loaded.subject, base_of(loaded.recipe, options.run), loaded.seed_or(options.seed)
    plan = plan_script(subject, loaded.decomposition, *sections, seed)
    if dry_run:
        return Outcome(report_plan(plan), subject, base, {})
    wanted = options.exam.named or plan.script.asks_facts
    facts = options.exam.facts if wanted else None
    with console.progress() as progress:
        text = options.exam.kept_text(loaded.recipe, subject, progress, plan.script.asks_text)
        exam = script_exam(subject, plan.questions, facts, options.exam.records, seed, text, progress)
    edits = plan.edits(subject.target, loaded.decomposition)
    with console.progress(MEASURING) as progress:
        report = report_script(subject, loaded.decomposition, plan, edits, exam, progress)
    return Outcome(report, subject, base, next(iter(edits.values())))


def use_patch(
    console: Console, options: RunOptions, apply: Path | None, revert: Path | None, base: Path | None
) -> Outcome:
    """Apply a patch to a run's target (or `base`), or revert it."""
    from spdcli.edits.checkpoints import base_of, recipe_on
    from spdcli.edits.edit_reports import patch_target, report_patch
    from spdcli.edits.patches import load_patch
    from spdcli.runs.directory import TOY, RunDirectory
    from spdcli.runs.fingerprint import require_same_weights
    from spdcli.runs.loading import seed_or
    from spdcli.runs.subject import choose_device, open_subject

    path = apply or revert
    assert path is not None
    patch = load_patch(path)
    directory = RunDirectory.open(options.run)
    recipe = recipe_on(directory.recipe, base)
    with console.progress(f"opening {base or options.run}"):
        subject = open_subject(recipe, choose_device(options.device or recipe.device), base or directory / TOY)
    if base is None:
        require_same_weights(directory.path, subject.target)
    edit, weights = patch_target(subject.target, patch, path, apply is None)
    exam = options.exam.open(console, recipe, subject, seed_or(recipe, options.seed))
    with console.progress(MEASURING) as progress:
        report = report_patch(subject, patch, edit, exam, apply is None, progress)
    return Outcome(report, subject, base_of(recipe, options.run), edit, weights)


def write(outcome: Outcome, data: dict[str, Any], save: Path | None, patch: Path | None, force: bool) -> None:
    """Write the edited model and the patch, where they are wanted; `data` is the record that goes with them."""
    from spdcli.edits.checkpoints import check_destination, save_checkpoint
    from spdcli.edits.edit_reports import SuppressionReport
    from spdcli.edits.patches import edited_weights, make_patch, save_patch

    target = outcome.subject.target
    if save is not None:
        check_destination(save, force, outcome.base)
        weights = edited_weights(target, outcome.edit) if outcome.weights is None else outcome.weights
        save_checkpoint(save, outcome.subject, weights, data, force)
    if patch is not None:
        report = outcome.report
        assert isinstance(report, SuppressionReport)
        evidence = {
            "together": report.together,
            "matrices": report.matrices,
            "facts": report.facts,
            "effects": prompts_only(report.effects),
        }
        save_patch(patch, make_patch(target, outcome.edit, report.slices, evidence))
