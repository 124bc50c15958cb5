"""The induction experiment of section 6.1: the paper's toy from training to Table 1, seed by seed.

Every seed's toy, decomposition, evaluation and SVD baseline go into OUT/seed-N. What is finished is reused while its
recipe is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdcli.api import finished
from spdcli.disk import write_json
from spdcli.figures.run_files import SVD, write_evaluation, write_rank_curves
from spdcli.measures.circuit_data import circuit_data
from spdcli.measures.evaluation import evaluate
from spdcli.measures.evaluation_totals import EVALUATION_SCHEMA
from spdcli.measures.slice_similarity import weight_signature
from spdcli.measures.svd import svd_curves
from spdcli.measures.svd_methods import METHODS
from spdcli.paper.slice_matching import SliceScore, effect_signatures, stability
from spdcli.paper.table1 import claims
from spdcli.paper.verdict import REPORT, SCHEMA, ClaimRow, Verdict, judge
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.reading import LoadedRecipe, load_recipe
from spdcli.records import plain
from spdcli.runs.directory import EVAL
from spdcli.runs.loading import LoadedRun
from spdcli.runs.opening import claimed_run
from spdcli.runs.results import kept_result

STABILITY_SEQUENCES = 512
SVD_SEQUENCES, SVD_TOLERANCE = 512, 1e-3  # those of `spd svd`


@dataclass(frozen=True)
class RankLeft:
    """Figure 2 in a number: the rank that each method of `spd svd` has left at a KL of `tolerance`, in nats; None where
    it never comes so close."""

    tolerance: float
    rank: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class InductionSeed:
    """One seed: whether it meets every stated bound, those that it breaks, and what no row of the table holds.

    `minutes` are those that the decomposition trained; `attention_kl_split`, `attention` and `controls` are of its
    `spd.eval/2`, as JSON.
    """

    seed: int
    run: str
    passed: bool
    broken: list[str]
    toy_accuracy: float
    minutes: float
    attention_kl_split: Any
    attention: Any
    controls: dict[str, Any]
    svd: RankLeft


@dataclass(frozen=True)
class MatrixStability:
    """Scores of the `slices` of one matrix, over all seeds: their mean and the least."""

    mean: float
    min: float
    slices: int


@dataclass(frozen=True, kw_only=True)
class SeedSlice(SliceScore):
    """A slice's score, with the seed of its run."""

    seed: int


@dataclass(frozen=True)
class SliceStability:
    """How well slices are found again by other seeds, compared by `definition`: as weights or by their effects."""

    definition: str
    matrices: dict[str, MatrixStability]
    slices: list[SeedSlice]


@dataclass(frozen=True)
class InductionExperiment:
    """`spd.reproduce/1` of the toy: a row a claim, what each seed says, and of several seeds how stable slices are."""

    recipe: str
    rows: list[ClaimRow]
    passed: bool
    seeds: list[InductionSeed]
    stability: SliceStability | None


def reproduce_induction(
    recipe: str,
    out: Path,
    seeds: int = 1,
    same_toy: bool = False,
    sequences: int = 8192,
    settings: Sequence[str] = (),
    device: str | None = None,
    force: bool = False,
    report: Report = silent,
) -> tuple[InductionExperiment, Verdict]:
    """Every seed, counted from the recipe's own; writes OUT/reproduce.json.

    With `same_toy` the toy of the first seed is decomposed under every seed; each is measured on `sequences` fresh
    sequences; `settings` change the recipe as `--set` does. RecipeError unless it is for a toy of the paper's kind;
    UsageError for a run by another recipe, unless `force` replaces it.
    """
    recipes = seed_recipes(recipe, settings, device, seeds, out.resolve() if same_toy else None)
    directories = [claimed_run(out / f"seed-{loaded.recipe.seed}", loaded, force, report) for loaded in recipes]
    runs, evaluations, ranks = [], [], []
    for nth, (directory, loaded) in enumerate(zip(directories, recipes, strict=True), 1):
        report(Progress(f"seed {loaded.recipe.seed} ({nth} of {seeds}) in {directory.path}"))
        run = finished(directory, loaded, report)
        runs.append(run)
        evaluations.append(evaluation_of(run, sequences, report))
        ranks.append(rank_left(run, report))
    verdict = judge(evaluations, claims())
    entries = [induction_seed(*one) for one in zip(runs, evaluations, ranks, verdict.broken, strict=True)]
    matched = slice_stability(runs, same_toy) if seeds > 1 else None
    experiment = InductionExperiment(recipe, verdict.rows, verdict.passed, entries, matched)
    write_json(out / REPORT, {"schema": SCHEMA, **plain(experiment)})
    return experiment, verdict


def seed_recipes(
    recipe: str, settings: Sequence[str], device: str | None, seeds: int, shared: Path | None
) -> list[LoadedRecipe]:
    """The recipe once a seed; with `shared`, the seeds after the first decompose the toy of the first one's run there.

    RecipeError unless it is a recipe for a toy of the paper's kind.
    """
    first = load_recipe(recipe, settings, device=device)
    target = first.recipe.target
    if target.kind != "induction":
        raise first.error("target.kind", "[target] kind = 'huggingface': only the induction toy can be reproduced")
    papers = {"layers": 2, "heads": 1, "layer_norm": False, "feed_forward": False}
    for key, value in papers.items():
        if getattr(target, key) != value:
            raise first.error(f"target.{key}", f"[target] {key}: the paper's toy, and its Table 1, have {value}")
    if first.recipe.slices.matrices != ["*"]:
        raise first.error("slices.matrices", "[slices] matrices: Table 1 is about all matrices; leave it out")
    start = first.recipe.seed
    later = list(settings)
    if shared is not None and target.path is None:
        later.append(f"target.path={json.dumps(str(shared / f'seed-{start}'))}")
    return [first, *(load_recipe(recipe, later, seed=start + k, device=device) for k in range(1, seeds))]


def evaluation_of(run: LoadedRun, sequences: int, report: Report) -> dict[str, Any]:
    """What `spd eval` says of the run, measured now unless it was measured so before."""
    seed = run.recipe.seed
    settings = {"schema": EVALUATION_SCHEMA, "sequences": sequences, "threshold": 0.0, "seed": seed}
    before = kept_result(run.home, EVAL, report)
    if (
        "circuit" in before
        and "pgd_shared" in before.get("evidence", {})
        and all(before.get(key) == value for key, value in settings.items())
    ):
        return before
    return write_evaluation(run, evaluate(run.subject, run.decomposition, sequences, 0.0, seed))


def rank_left(run: LoadedRun, report: Report) -> RankLeft:
    """What every method of `spd svd` has left at its usual tolerance; the curves go into the run's figures."""
    data = kept_result(run.home, SVD, report)
    settings = {"schema": "spd.svd/1", "tolerance": SVD_TOLERANCE, "looked_at": SVD_SEQUENCES}
    if any(data.get(key) != value for key, value in settings.items()) or set(data["result"]) != set(METHODS):
        curves = svd_curves(
            run.subject,
            run.decomposition,
            tolerance=SVD_TOLERANCE,
            sequences=SVD_SEQUENCES,
            seed=run.recipe.seed,
            report=report,
        )
        data = write_rank_curves(run, curves)
    ranks = {name: None if result is None else result["total_rank"] for name, result in data["result"].items()}
    return RankLeft(data["tolerance"], ranks)


def induction_seed(run: LoadedRun, evaluation: Mapping[str, Any], ranks: RankLeft, broken: list[str]) -> InductionSeed:
    """What there is to say of one seed, which breaks the bounds `broken`."""
    circuit = evaluation["circuit"]
    return InductionSeed(
        seed=run.recipe.seed,
        run=str(run.home.path),
        passed=not broken,
        broken=broken,
        toy_accuracy=evaluation["accuracy"]["target"],
        minutes=run.home.last_record["seconds"] / 60,
        attention_kl_split=evaluation["attention_kl_split"],
        attention=circuit["attention"],
        controls={name: control["all"] for name, control in circuit["controls"].items()},
        svd=ranks,
    )


def slice_stability(runs: Sequence[LoadedRun], same_toy: bool) -> SliceStability:
    """How well each seed's slices are found again by the others: as weights on one toy, by their effects on several."""
    signatures = []
    for run in runs:
        data = circuit_data(run.subject, run.decomposition, STABILITY_SEQUENCES, 0.0, runs[0].recipe.seed)
        if same_toy:
            slices = run.decomposition
            signatures.append({name: weight_signature(slices.of(name), data.active[name]) for name in data.g})
        else:
            signatures.append(effect_signatures(data))
    scores = stability(signatures)
    by_matrix: dict[str, list[float]] = {}
    for one in scores:
        by_matrix.setdefault(one.slice.split(":")[0], []).append(one.score)
    return SliceStability(
        definition="weights" if same_toy else "effects",
        matrices={name: MatrixStability(sum(s) / len(s), min(s), len(s)) for name, s in by_matrix.items()},
        slices=[SeedSlice(seed=runs[one.run].recipe.seed, **vars(one)) for one in scores],
    )
