"""`spd certify`: everything that `spd eval` measures, seeds matched, held-out text and what an edit script does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spdcli.certification.certificate import Certificate, CertificateRow, Measured, judged
from spdcli.certification.held_out import held_out
from spdcli.certification.matching import matched
from spdcli.edits.exam import script_exam
from spdcli.edits.expectations import report_script
from spdcli.edits.facts_file import Facts
from spdcli.edits.script import Script
from spdcli.edits.script_plan import plan_script
from spdcli.measures.evaluation import evaluate_without_circuit
from spdcli.measures.evidence_choices import CORNERS, MaskSearch
from spdcli.measures.language_evaluation import LanguageEvaluation
from spdcli.measures.toy_evaluation import ToyEvaluation
from spdcli.progress import Progress, Report, counted, silent
from spdcli.recipe.reading import Source
from spdcli.runs.loading import LoadedRun
from spdcli.runs.subject import require_tokens

CURVE = MaskSearch("curve")
MATCHING_SEQUENCES = 1024  # of the toy, on which a slice counts as active


@dataclass(frozen=True)
class Certifying:
    """How much is looked at: `sequences` fresh ones of the toy; a slice is active above `threshold`; `adversary` says
    how hard masks are sought; `seed` draws sequences, masks and starts."""

    sequences: int = 8192
    threshold: float = 0.0
    adversary: MaskSearch = CURVE
    seed: int = 0


def certify(
    run: LoadedRun,
    bounds: Mapping[str, float],
    settings: Certifying,
    against: Sequence[LoadedRun] = (),
    script: tuple[Script, Source] | None = None,
    facts: Facts | None = None,
    report: Report = silent,
) -> Certificate:
    """The certificate of a run, held against `bounds` by the names of `recipe.bounds.BOUNDS`.

    `against` are other runs of the same target; `script` is an edit script, whose expectations are rows with bounds of
    their own, and `facts` those that it may ask. UsageError for a toy of sparse features.
    """
    subject, decomposition = run.subject, run.decomposition
    require_tokens(subject)
    report(Progress("measuring, and seeking masks that break it"))
    evaluation = evaluate_without_circuit(
        subject,
        decomposition,
        settings.sequences,
        settings.threshold,
        settings.seed,
        settings.adversary,
        report=report,
    )
    assert isinstance(evaluation, ToyEvaluation | LanguageEvaluation)
    measured = {**of_evaluation(evaluation), **held_out(subject, decomposition, report)}
    measured |= of_others(run, against, settings, report)
    rows = judged(measured, bounds)
    if script is not None:
        report(Progress("measuring the edits"))
        rows += of_script(run, script, facts, settings.seed, report)
    return Certificate(rows=rows, passed=all(row.passed is not False for row in rows))


def of_evaluation(evaluation: ToyEvaluation | LanguageEvaluation) -> dict[str, Measured]:
    """What an evaluation says, by the names of BOUNDS."""
    toy = isinstance(evaluation, ToyEvaluation)
    on = f"{evaluation.sequences} " + ("fresh sequences, none of them trained on" if toy else "prompts of the recipe")
    metrics, evidence = evaluation.metrics, evaluation.evidence
    numbers = {
        "l0": evaluation.l0,
        "total_active": evaluation.total_active,
        "recon_layerwise": metrics["recon_layerwise"],
        "accuracy_importance": evidence.accuracy["importance"],
        **{f"kl_{name}": value for name, value in evidence.kl.items()},
        "accuracy_corners": min(evidence.accuracy[name] for name in CORNERS),
        "delta_share": max(evaluation.delta_share.values()),
        **{f"delta_share:{name}": share for name, share in evaluation.delta_share.items()},
    }
    if isinstance(evaluation, ToyEvaluation):
        numbers["active_random"] = max(classes["random"] for classes in evaluation.active.values())
    measured = {name: Measured(value, on) for name, value in numbers.items()}
    measured["faithfulness"] = Measured(metrics["faithfulness"], "exact")
    return measured | of_searches(evaluation)


def of_searches(evaluation: ToyEvaluation | LanguageEvaluation) -> dict[str, Measured]:
    """What the searches for masks found; of the curve the worst point, and each as `pgd_curve:STEPS`."""
    evidence = evaluation.evidence
    found = {name: Measured(one.kl, one.allowed) for name, one in evidence.attacks.items() if "curve" not in name}
    if evidence.pgd_shared:
        found["pgd_shared_accuracy"] = Measured(evidence.pgd_shared.accuracy, evidence.pgd_shared.allowed)
    curve = evidence.pgd_curve or ()
    if curve:
        worst = max(curve, key=lambda point: point.kl)
        found["pgd_curve"] = Measured(worst.kl, worst.allowed)
    return found | {f"pgd_curve:{point.steps}": Measured(point.kl, point.allowed) for point in curve}


def of_others(
    run: LoadedRun, against: Sequence[LoadedRun], settings: Certifying, report: Report
) -> dict[str, Measured]:
    """How well the run's slices are found again in each of the other runs, and in the one that has them least."""
    found: dict[str, Measured] = {}
    for other in counted(against, "other runs", report):
        match = matched(run, other, MATCHING_SEQUENCES, settings.threshold, settings.seed)
        name = "memory" if other.directory is None else str(other.directory)
        for letter, value in (("U", match.U), ("V", match.V)):
            found[f"matched_{letter}:{name}"] = Measured(value, f"{match.slices} active slices, against {name}")
    for letter in "UV" if against else "":
        each = [one for key, one in found.items() if key.startswith(f"matched_{letter}:")]
        found[f"matched_{letter}"] = min(each)
    return found


def of_script(
    run: LoadedRun, script: tuple[Script, Source], facts: Facts | None, seed: int, report: Report
) -> list[CertificateRow]:
    """A row an expectation of an edit script, and one an edit for each statistic of its collateral on other facts."""
    plan = plan_script(run.subject, run.decomposition, *script, seed)
    exam = script_exam(run.subject, plan.questions, facts, seed=seed, report=report)
    edits = plan.edits(run.subject.target, run.decomposition)
    outcome = report_script(run.subject, run.decomposition, plan, edits, exam, report)
    rows = [
        CertificateRow(
            name=f"edit:{one.edit}: {one.name}",
            value=one.value,
            bound=one.bound,
            passed=one.passed,
            budget=f"edit script {script[1].name}",
            grade="",
            about="what the script expects of the edit",
        )
        for one in outcome.expectations
    ]
    for edit in outcome.edits:
        for name, value in edit.facts.relative_change.items() if edit.facts else ():
            rows.append(
                CertificateRow(
                    name=f"edit:{edit.name}: {name} of other facts",
                    value=value,
                    bound=None,
                    passed=None,
                    budget=f"{edit.facts.known if edit.facts else 0} facts that the model knows",
                    grade="",
                    about="collateral: relative change of other facts' answers",
                )
            )
    return rows
