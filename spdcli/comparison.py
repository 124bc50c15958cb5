"""What a setting of a recipe costs and buys, at equal steps and at equal time: what `spd compare` does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spdcli.api import finished
from spdcli.errors import UsageError
from spdcli.measures.active_counts import active_per_position
from spdcli.measures.evaluation import evaluate_without_circuit
from spdcli.measures.evaluation_totals import Evaluation
from spdcli.measures.evidence import Evidence
from spdcli.measures.feature_evaluation import FeatureEvaluation, PartsFound
from spdcli.measures.toy_evaluation import ToyEvaluation
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.overrides import parse_override
from spdcli.recipe.reading import LoadedRecipe, load_recipe
from spdcli.recipe.schema import ToyTarget
from spdcli.records import ABSENT, Absent
from spdcli.runs.opening import claimed_run

TENTH = 0.1  # above it a slice is counted that smooth L0 has not merely left near 0
AS_IT_IS = "the recipe as it is"


@dataclass(frozen=True, kw_only=True)
class SettingRun:
    """One run: what its `setting` is, where it is, and what it costs and gives.

    `seconds` are those of training its `steps`; `active` are active slices a position at the last of them, over all
    matrices; `l0` the same on the sequences that are measured, `l0_above_tenth` of those whose importance is above 0.1;
    `total_active` slices that are active somewhere and `unique` those by matrix; `active_by_class` are a toy's active
    slices by matrix and position class (Table 1a). `metrics` are the losses of `spd eval` by name, and `evidence` what
    they are worth, as there; of a toy of sparse features there is none, but `live` slices by matrix, and `parts`, what
    is found of its known ones.
    """

    setting: str
    run: str
    steps: int
    seconds: float
    active: float
    l0: float
    l0_above_tenth: float
    total_active: int
    unique: Mapping[str, int]
    metrics: Mapping[str, float]
    standard_error: Mapping[str, float | None]
    evidence: Evidence | Absent = ABSENT
    active_by_class: Mapping[str, Mapping[str, float]] | Absent = ABSENT
    live: Mapping[str, int] | Absent = ABSENT
    parts: Mapping[str, PartsFound] | Absent = ABSENT


def compare_settings(
    recipe: str,
    changes: Sequence[str],
    out: Path,
    settings: Sequence[str] = (),
    sequences: int = 2048,
    seed: int | None = None,
    device: str | None = None,
    force: bool = False,
    report: Report = silent,
    equal_time: bool = True,
) -> list[SettingRun]:
    """The recipe with `settings`, then with each of `changes` as well, decomposed into directories under `out`.

    Settings are as `--set` takes them; a change may be several, with `;` between them. With `equal_time` a change that
    makes steps faster gets a second run, of as many steps as fit the time of the recipe as it is. What is finished is
    reused; the toy of the first run is that of all. The toy is measured on `sequences` fresh sequences.
    """
    overrides = [[parse_override(one, "--with") for one in together(change)] for change in changes]
    recipes = [
        load_recipe(recipe, [*settings, *some], seed=seed, device=device) for some in overrides
    ]  # errors come first
    base = load_recipe(recipe, settings, seed=seed, device=device)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a directory", "name another with --out")
    first = setting_run(out / "as-it-is", AS_IT_IS, base, sequences, force, report)
    shared = list(settings)
    if isinstance(base.recipe.target, ToyTarget) and base.recipe.target.path is None:
        shared.append(f"target.path={json.dumps(str((out / 'as-it-is').resolve()))}")
    runs = [first]
    for number, (change, loaded) in enumerate(zip(changes, recipes, strict=True), 1):
        with_toy = load_recipe(recipe, [*shared, *together(change)], seed=seed, device=device)
        runs.append(setting_run(out / f"{number}-equal-steps", change, with_toy, sequences, force, report))
        steps = round(loaded.recipe.decompose.steps * first.seconds / runs[-1].seconds)
        if equal_time and steps > loaded.recipe.decompose.steps:
            longer = [*shared, *together(change), f"decompose.steps={steps}"]
            longer_recipe = load_recipe(recipe, longer, seed=seed, device=device)
            runs.append(setting_run(out / f"{number}-equal-time", change, longer_recipe, sequences, force, report))
    return runs


def together(change: str) -> list[str]:
    """The settings of one change: `a=1; b=2` are two."""
    return [part.strip() for part in change.split(";")]


def setting_run(
    folder: Path, setting: str, loaded: LoadedRecipe, sequences: int, force: bool, report: Report
) -> SettingRun:
    """One run, trained unless it is there already, and measured."""
    report(Progress(f"{setting}, {loaded.recipe.decompose.steps} steps, in {folder}"))
    run = finished(claimed_run(folder, loaded, force, report), loaded, report)
    last = run.home.last_record
    evaluation = evaluate_without_circuit(run.subject, run.decomposition, sequences, 0.0, loaded.recipe.seed)
    thresholds = (0.0, TENTH)
    l0, above = active_per_position(run.subject, run.decomposition, thresholds, sequences, loaded.recipe.seed)
    return SettingRun(
        setting=setting,
        run=str(folder),
        steps=last["step"],
        seconds=last["seconds"],
        active=sum(last["active"].values()),
        l0=l0,
        l0_above_tenth=above,
        total_active=evaluation.total_active,
        unique=evaluation.unique,
        metrics=evaluation.metrics,
        standard_error=evaluation.standard_error,
        evidence=evaluation.evidence if isinstance(evaluation, Evaluation) else ABSENT,
        active_by_class=evaluation.active if isinstance(evaluation, ToyEvaluation) else ABSENT,
        live=evaluation.live if isinstance(evaluation, FeatureEvaluation) else ABSENT,
        parts=evaluation.parts if isinstance(evaluation, FeatureEvaluation) else ABSENT,
    )
