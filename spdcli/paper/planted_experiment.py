"""Planted targets decomposed and scored against the slices that are known, seed by seed, beside plain baselines.

Every seed plants new directions. The runs go into OUT/NAME/seed-N, NAME that of the recipe without "planted-"; what is
finished is reused while its recipe is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from spdcli.api import finished
from spdcli.disk import write_json
from spdcli.measures.evaluation import evaluate
from spdcli.measures.evaluation_totals import Evaluation
from spdcli.measures.recovery_baselines import baseline_recoveries
from spdcli.measures.slice_recovery import Recovery, SliceRecovery
from spdcli.paper.verdict import REPORT, SCHEMA, Bound, Claim, ClaimRow, Evidence, Verdict, judge, mean_of_known
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.reading import LoadedRecipe, load_recipe
from spdcli.records import plain
from spdcli.runs.directory import FIGURES
from spdcli.runs.loading import LoadedRun
from spdcli.runs.opening import claimed_run
from spdcli.runs.results import kept_result, write_result

RECIPES = ("planted-induction", "planted-lookup")
RECOVERY, RECOVERY_SCHEMA = f"{FIGURES}/recovery.json", "spd.recovery/1"  # of one run
LEAST, MOST = 0.95, 0.05  # what has to be found, and what may be wrong
SPD = "spd"


@dataclass(frozen=True, kw_only=True)
class PlantedSeed:
    """One seed: whether it meets every bound, those that it breaks, and by target (`name`) how well each method finds
    the planted slices; `minutes` are those that the decompositions trained."""

    seed: int
    passed: bool
    broken: list[str]
    minutes: dict[str, float]
    recovery: dict[str, dict[str, Recovery]]


@dataclass(frozen=True, kw_only=True)
class RecoveryRow:
    """One method on one target, a mean over seeds of what it finds of all matrices together."""

    target: str
    method: str
    seeds: int
    recovery: dict[str, float | None]


@dataclass(frozen=True)
class PlantedExperiment:
    """`spd.reproduce/1` of planted targets: a row a claim, a row a method and target, and what each seed says."""

    rows: list[ClaimRow]
    passed: bool
    recovery: list[RecoveryRow]
    seeds: list[PlantedSeed]


def reproduce_planted(
    recipes: Sequence[str],
    out: Path,
    seeds: int = 1,
    sequences: int = 2048,
    settings: Sequence[str] = (),
    device: str | None = None,
    force: bool = False,
    report: Report = silent,
) -> tuple[PlantedExperiment, Verdict]:
    """Every recipe under every seed, counted from its own; writes OUT/reproduce.json.

    Each run is scored on `sequences` fresh sequences; `settings` change the recipes as `--set` does. RecipeError unless
    they are for planted targets; UsageError for a run by another recipe, unless `force` replaces it.
    """
    jobs = [
        (loaded.recipe.name.removeprefix("planted-"), loaded)
        for recipe in recipes
        for loaded in planted_recipes(recipe, settings, device, seeds)
    ]
    directories = [
        claimed_run(out / name / f"seed-{loaded.recipe.seed}", loaded, force, report) for name, loaded in jobs
    ]
    evidence: dict[int, dict[str, Any]] = {}
    for nth, (directory, (name, loaded)) in enumerate(zip(directories, jobs, strict=True), 1):
        report(Progress(f"{name}, seed {loaded.recipe.seed} ({nth} of {len(jobs)}) in {directory.path}"))
        run = finished(directory, loaded, report)
        evidence.setdefault(loaded.recipe.seed, {})[name] = recovery_of(run, sequences, report)
    names = list(dict.fromkeys(name for name, _ in jobs))
    verdict = judge(list(evidence.values()), planted_claims(names))
    entries = [
        PlantedSeed(
            seed=seed,
            passed=not broken,
            broken=broken,
            minutes={name: one["minutes"] for name, one in targets.items()},
            recovery={name: one["recovery"] for name, one in targets.items()},
        )
        for (seed, targets), broken in zip(evidence.items(), verdict.broken, strict=True)
    ]
    experiment = PlantedExperiment(verdict.rows, verdict.passed, recovery_rows(list(evidence.values())), entries)
    write_json(out / REPORT, {"schema": SCHEMA, **plain(experiment)})
    return experiment, verdict


def planted_recipes(recipe: str, settings: Sequence[str], device: str | None, seeds: int) -> list[LoadedRecipe]:
    """The recipe once a seed; RecipeError unless it is for a planted target."""
    first = load_recipe(recipe, settings, device=device)
    kind = first.recipe.target.kind
    if not kind.startswith("planted"):
        raise first.error("target.kind", f"[target] kind = '{kind}': only slices that were planted are known")
    start = first.recipe.seed
    return [first, *(load_recipe(recipe, settings, seed=start + k, device=device) for k in range(1, seeds))]


def recovery_of(run: LoadedRun, sequences: int, report: Report) -> dict[str, Any]:
    """How well the run and the baselines find the planted slices, as JSON; measured now unless it was before."""
    before = kept_result(run.home, RECOVERY, report)
    settings = {"schema": RECOVERY_SCHEMA, "sequences": sequences}
    if all(before.get(key) == value for key, value in settings.items()):
        return before
    evaluation = evaluate(run.subject, run.decomposition, sequences, 0.0, run.recipe.seed)
    assert isinstance(evaluation, Evaluation)
    recoveries = {SPD: evaluation.recovery, **baseline_recoveries(run, sequences)}
    data = settings | {
        "minutes": run.home.last_record["seconds"] / 60,
        "metrics": plain(evaluation.metrics),
        "recovery": plain(recoveries),
    }
    return write_result(run.home, run.decomposition, RECOVERY, data)


def planted_claims(names: Sequence[str]) -> list[Claim]:
    """What must hold of the slices that SPD finds of each target, and what agrees of its reconstruction."""
    least, most = Bound(LEAST, None, stated=True), Bound(None, MOST, stated=True)
    bounds = {"precision": least, "recall": least, "cosine": least, "missing": most, "idle": most}
    claims = []
    for name in names:
        claims += [
            Claim(f"{name}: {key}", _at(name, "recovery", SPD, "total", key), None, bound)
            for key, bound in bounds.items()
        ]
        losses = {"faithfulness": 1e-6, "recon": 1e-2}
        claims += [
            Claim(f"{name}: {key}", _at(name, "metrics", key), None, Bound(None, loss, stated=False))
            for key, loss in losses.items()
        ]
    return claims


def recovery_rows(evidence: Sequence[Evidence]) -> list[RecoveryRow]:
    """A row a target and method: means over seeds."""
    rows = []
    for target, first in evidence[0].items():
        for method in first["recovery"]:
            totals = [seed[target]["recovery"][method]["total"] for seed in evidence]
            means = {one.name: mean_of_known([total[one.name] for total in totals]) for one in fields(SliceRecovery)}
            rows.append(RecoveryRow(target=target, method=method, seeds=len(totals), recovery=means))
    return rows


def _at(*path: str) -> Callable[[Evidence], float]:
    """Reads the number at a path of keys."""

    def read(evidence: Evidence) -> float:
        value: Any = evidence
        for part in path:
            value = value[part]
        return value

    return read
