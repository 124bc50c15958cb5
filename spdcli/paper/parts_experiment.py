"""The toys whose parts are known, from training to the published numbers, recipe by recipe and seed by seed.

Every seed's toy, decomposition and evaluation go into OUT/RECIPE/seed-N. What is finished is reused while its recipe is
the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdcli.api import finished
from spdcli.disk import read_json, write_json
from spdcli.figures.run_files import write_evaluation
from spdcli.measures.evaluation import evaluate
from spdcli.paper.known_parts import claims, recipes_of
from spdcli.paper.verdict import REPORT, SCHEMA, ClaimRow, Verdict, judge
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.reading import LoadedRecipe, load_recipe
from spdcli.records import plain
from spdcli.runs.directory import EVAL
from spdcli.runs.loading import LoadedRun
from spdcli.runs.opening import claimed_run


@dataclass(frozen=True, kw_only=True)
class PartsSeed:
    """One seed of one recipe: whether it meets every bound, those that it breaks, and what no row of the table holds.

    `minutes` are those that the decomposition trained; `own` counts by matrix the features with a slice of their own;
    `metrics` are those of its `spd.eval/1`.
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


@dataclass(frozen=True)
class PartsExperiment:
    """`spd.reproduce/1` of toys whose parts are known: a row a published number, and what each seed says."""

    recipes: Sequence[str]
    rows: list[ClaimRow]
    passed: bool
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
        evaluations = [evaluation_of(run, inputs) for run in runs]
        verdict = judge(evaluations, numbers)
        rows += verdict.rows
        broken += verdict.broken
        entries += [parts_seed(*one) for one in zip(runs, evaluations, verdict.broken, strict=True)]
    whole = Verdict(rows, broken)
    passed = all(row.agrees for row in rows) and whole.passed
    outcome = PartsExperiment(list(names), rows, passed, entries)
    write_json(out / REPORT, {"schema": SCHEMA, **plain(outcome)})
    return outcome, whole


def _finished(loaded: LoadedRecipe, folder: Path, force: bool, report: Report) -> LoadedRun:
    directory = claimed_run(folder / f"seed-{loaded.recipe.seed}", loaded, force)
    report(Progress(f"{loaded.recipe.name}, seed {loaded.recipe.seed}, in {directory.path}"))
    return finished(directory, loaded, report)


def evaluation_of(run: LoadedRun, inputs: int) -> dict[str, Any]:
    """What `spd eval` says of the run, measured now unless it was measured so before."""
    seed = run.recipe.seed
    settings = {"schema": "spd.eval/1", "sequences": inputs, "threshold": 0.0, "seed": seed}
    before = read_json(run.home / EVAL)
    if "parts" in before and all(before.get(key) == value for key, value in settings.items()):
        return before
    return write_evaluation(run, evaluate(run.subject, run.decomposition, inputs, 0.0, seed))


def parts_seed(run: LoadedRun, evaluation: Mapping[str, Any], broken: list[str]) -> PartsSeed:
    """What there is to say of one seed, which breaks the bounds `broken`."""
    return PartsSeed(
        recipe=run.recipe.name,
        seed=run.recipe.seed,
        run=str(run.home.path),
        passed=not broken,
        broken=broken,
        minutes=run.home.metrics()[-1]["seconds"] / 60,
        own={name: parts["own"] for name, parts in evaluation["parts"].items()},
        active=evaluation["active"],
        metrics=evaluation["metrics"],
    )
