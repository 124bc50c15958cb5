"""The toys whose parts are known, from training to the published numbers, recipe by recipe and seed by seed.

Every seed's toy, decomposition and evaluation go into OUT/RECIPE/seed-N. What is finished is reused while its recipe is
the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdcli.api import finished
from spdcli.disk import write_json
from spdcli.figures.run_files import write_evaluation
from spdcli.measures.evaluation import evaluate
from spdcli.measures.evaluation_totals import EVALUATION_SCHEMA
from spdcli.measures.feature_evaluation import PartsFound
from spdcli.measures.parts_baselines import baseline_parts
from spdcli.paper.known_parts import claims, recipes_of
from spdcli.paper.verdict import REPORT, SCHEMA, ClaimRow, Verdict, judge, mean_of_known
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.reading import LoadedRecipe, load_recipe
from spdcli.records import plain
from spdcli.runs.directory import EVAL, FIGURES
from spdcli.runs.loading import LoadedRun
from spdcli.runs.opening import claimed_run
from spdcli.runs.results import kept_result, write_result

BASELINES, BASELINES_SCHEMA = f"{FIGURES}/baselines.json", "spd.parts-baselines/1"  # of one run
GREEDY_INPUTS = 512


@dataclass(frozen=True, kw_only=True)
class PartsSeed:
    """One seed of one recipe: whether it meets every bound, those that it breaks, and what no row of the table holds.

    `minutes` are those that the decomposition trained; `own` counts by matrix the features with a slice of their own;
    `metrics` are those of its `spd.eval/2`; `baselines` say by method and matrix what other methods find of the parts.
    """

    recipe: str
    seed: int
    run: str
    passed: bool
    broken: list[str]
    minutes: float
    own: Mapping[str, int]
    active: Mapping[str, Mapping[str, float]]
    metrics: Mapping[str, float]
    baselines: Mapping[str, Mapping[str, PartsFound]]


@dataclass(frozen=True, kw_only=True)
class MethodParts:
    """What a method other than SPD finds of the parts of one matrix, means over the seeds of a recipe.

    None where it finds no slice under any seed.
    """

    recipe: str
    matrix: str
    method: str
    mean_max_cosine: float | None
    l2_ratio: float | None
    own: float


@dataclass(frozen=True)
class PartsExperiment:
    """`spd.reproduce/1` of toys whose parts are known: a row a published number, a row a method, and what each seed
    says."""

    recipes: Sequence[str]
    rows: list[ClaimRow]
    passed: bool
    methods: list[MethodParts]
    seeds: list[PartsSeed]


def reproduce_parts(
    experiment: str,
    recipe: str | None,
    out: Path,
    seeds: int = 1,
    inputs: int = 8192,
    settings: Sequence[str] = (),
    device: str | None = None,
    force: bool = False,
    report: Report = silent,
) -> tuple[PartsExperiment, Verdict]:
    """All recipes of an experiment (`tms`, `resid-mlp`), or the one `recipe`, each on so many seeds from its own.

    Writes OUT/reproduce.json. Each seed is measured on `inputs` fresh inputs; `settings` change the recipes as `--set`
    does. RecipeError for a toy of which nothing is published; UsageError for a run by another recipe, unless `force`
    replaces it.
    """
    names = recipes_of(experiment, recipe)
    firsts = [load_recipe(name, settings, device=device) for name in names]
    wanted = [claims(first) for first in firsts]  # mistakes come first
    rows, broken, entries = [], [], []
    for name, first, numbers in zip(names, firsts, wanted, strict=True):
        starts = range(first.recipe.seed, first.recipe.seed + seeds)
        loaded = [load_recipe(name, settings, seed=seed, device=device) for seed in starts]
        runs = [_finished(one, out / first.recipe.name, force, report) for one in loaded]
        evaluations = [evaluation_of(run, inputs, report) for run in runs]
        verdict = judge(evaluations, numbers)
        rows += verdict.rows
        broken += verdict.broken
        for run, evaluation, bounds in zip(runs, evaluations, verdict.broken, strict=True):
            entries.append(parts_seed(run, evaluation, bounds, baselines_of(run, evaluation, report)))
    whole = Verdict(rows, broken)
    passed = all(row.agrees for row in rows) and whole.passed
    outcome = PartsExperiment(list(names), rows, passed, method_rows(entries), entries)
    write_json(out / REPORT, {"schema": SCHEMA, **plain(outcome)})
    return outcome, whole


def _finished(loaded: LoadedRecipe, folder: Path, force: bool, report: Report) -> LoadedRun:
    directory = claimed_run(folder / f"seed-{loaded.recipe.seed}", loaded, force, report)
    report(Progress(f"{loaded.recipe.name}, seed {loaded.recipe.seed}, in {directory.path}"))
    return finished(directory, loaded, report)


def evaluation_of(run: LoadedRun, inputs: int, report: Report) -> dict[str, Any]:
    """What `spd eval` says of the run, measured now unless it was measured so before."""
    seed = run.recipe.seed
    settings = {"schema": EVALUATION_SCHEMA, "sequences": inputs, "threshold": 0.0, "seed": seed}
    before = kept_result(run.home, EVAL, report)
    if "parts" in before and all(before.get(key) == value for key, value in settings.items()):
        return before
    return write_evaluation(run, evaluate(run.subject, run.decomposition, inputs, 0.0, seed))


def baselines_of(run: LoadedRun, evaluation: Mapping[str, Any], report: Report) -> dict[str, dict[str, PartsFound]]:
    """What the baselines find, by method and matrix; measured now unless it was before, on the same evaluation."""
    before = kept_result(run.home, BASELINES, report)
    settings = {"schema": BASELINES_SCHEMA, "active": evaluation["active"]}
    if all(before.get(key) == value for key, value in settings.items()):
        methods = before["parts"].items()
        return {method: {matrix: PartsFound(**one) for matrix, one in parts.items()} for method, parts in methods}
    report(Progress(f"{run.recipe.name}, seed {run.recipe.seed}: baselines"))
    parts = baseline_parts(run, evaluation["active"], GREEDY_INPUTS)
    write_result(run.home, run.decomposition, BASELINES, settings | {"parts": plain(parts)})
    return parts


def parts_seed(
    run: LoadedRun,
    evaluation: Mapping[str, Any],
    broken: list[str],
    baselines: Mapping[str, Mapping[str, PartsFound]],
) -> PartsSeed:
    """What there is to say of one seed, which breaks the bounds `broken`."""
    return PartsSeed(
        recipe=run.recipe.name,
        seed=run.recipe.seed,
        run=str(run.home.path),
        passed=not broken,
        broken=broken,
        minutes=run.home.last_record["seconds"] / 60,
        own={name: parts["own"] for name, parts in evaluation["parts"].items()},
        active=evaluation["active"],
        metrics=evaluation["metrics"],
        baselines=baselines,
    )


def method_rows(seeds: Sequence[PartsSeed]) -> list[MethodParts]:
    """A row a recipe, matrix and baseline."""
    by_recipe: dict[str, list[PartsSeed]] = {}
    for seed in seeds:
        by_recipe.setdefault(seed.recipe, []).append(seed)
    rows = []
    for recipe, own in by_recipe.items():
        for method, matrices in own[0].baselines.items():
            for matrix in matrices:
                parts = [seed.baselines[method][matrix] for seed in own]
                rows.append(
                    MethodParts(
                        recipe=recipe,
                        matrix=matrix,
                        method=method,
                        mean_max_cosine=mean_of_known([one.mean_max_cosine for one in parts]),
                        l2_ratio=mean_of_known([one.l2_ratio for one in parts]),
                        own=statistics.fmean(one.own for one in parts),
                    )
                )
    return rows
