"""`spd reproduce induction`: the paper's toy from training to Table 1, and whether it holds."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdcli.commands.reproduce import REPORT
from spdcli.errors import SpdError
from spdcli.files import read_json

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.console import Console
    from spdcli.recipe.reading import LoadedRecipe
    from spdcli.runs.loading import LoadedRun

STABILITY_SEQUENCES = 512
SVD_SEQUENCES, SVD_TOLERANCE = 512, 1e-3  # those of `spd svd`


def reproduce_induction(
    console: Console,
    recipe: str,
    out: Path,
    seeds: int,
    same_toy: bool,
    sequences: int,
    settings: list[str],
    device: str | None,
    force: bool,
) -> tuple[dict[str, Any], SpdError | None]:
    """Every seed of the induction experiment. The report, and the failure if there is one."""
    recipes = seed_recipes(recipe, settings, device, seeds, out.resolve() if same_toy else None)
    from spdcli.api import finished as finished_run
    from spdcli.files import write_json
    from spdcli.paper.table1 import compare, passes
    from spdcli.runs.training import claimed_run

    folders = [out / f"seed-{loaded.recipe.seed}" for loaded in recipes]
    runs = [claimed_run(folder, loaded, force) for folder, loaded in zip(folders, recipes, strict=True)]
    finished, evaluations, baselines = [], [], []
    for nth, (run, loaded) in enumerate(zip(runs, recipes, strict=True), 1):
        console.note(f"seed {loaded.recipe.seed} ({nth} of {seeds}) in {run.path}")
        with console.progress() as report:
            finished.append(finished_run(run, loaded, report))
        evaluations.append(evaluation_of(finished[-1], sequences))
        baselines.append(svd_baseline(finished[-1], console))
    rows, broken = compare(evaluations)
    told = [seed_report(*one) for one in zip(finished, evaluations, baselines, broken, strict=True)]
    data: dict[str, Any] = {
        "schema": "spd.reproduce/1",
        "recipe": recipe,
        "rows": rows,
        "passed": passes(broken),
        "seeds": told,
        "stability": slice_stability(finished, same_toy) if seeds > 1 else None,
    }
    write_json(out / REPORT, data)
    return data, None if data["passed"] else failure(data)


def seed_recipes(
    recipe: str, settings: list[str], device: str | None, seeds: int, shared: Path | None
) -> list[LoadedRecipe]:
    """The recipe once a seed; with `shared`, the seeds after the first decompose the toy of the first one's run there.

    RecipeError unless it is a recipe for a toy of the paper's kind.
    """
    from spdcli.recipe.reading import load_recipe

    first = load_recipe(recipe, settings, device=device)
    target = first.recipe.target
    if target.kind != "induction":
        raise first.error("target.kind", "[target] kind = 'huggingface': only the induction toy can be reproduced")
    plain = {"layers": 2, "heads": 1, "layer_norm": False, "feed_forward": False, "output_projection": False}
    for key, value in plain.items():
        if getattr(target, key) != value:
            raise first.error(f"target.{key}", f"[target] {key}: the paper's toy, and its Table 1, have {value}")
    if first.recipe.slices.matrices != ["*"]:
        raise first.error("slices.matrices", "[slices] matrices: Table 1 is about all six matrices; leave it out")
    start = first.recipe.seed
    later = list(settings)
    if shared is not None and target.path is None:
        later.append(f"target.path={jsonlib.dumps(str(shared / f'seed-{start}'))}")
    return [first, *(load_recipe(recipe, later, seed=start + k, device=device) for k in range(1, seeds))]


def evaluation_of(opened: LoadedRun, sequences: int) -> dict[str, Any]:
    """What `spd eval` says of the run, measured now unless it was measured so before."""
    from spdcli.figures.run_files import write_evaluation
    from spdcli.measures.evaluation import evaluate
    from spdcli.runs.directory import EVAL

    seed = opened.recipe.seed
    wanted = {"schema": "spd.eval/1", "sequences": sequences, "threshold": 0.0, "seed": seed}
    before = read_json(opened.home / EVAL)
    if "circuit" in before and all(before.get(key) == value for key, value in wanted.items()):
        return before
    return write_evaluation(opened, evaluate(opened.subject, opened.decomposition, sequences, 0.0, seed))


def svd_baseline(opened: LoadedRun, console: Console) -> dict[str, Any]:
    """Rank that every method of `spd svd` has left at its usual tolerance; the curves go into the run's figures."""
    from spdcli.figures.run_files import SVD, write_rank_curves
    from spdcli.measures.svd import svd_curves
    from spdcli.measures.svd_methods import METHODS

    data = read_json(opened.home / SVD)
    wanted = {"schema": "spd.svd/1", "tolerance": SVD_TOLERANCE, "looked_at": SVD_SEQUENCES}
    if any(data.get(key) != value for key, value in wanted.items()) or set(data["result"]) != set(METHODS):
        with console.progress() as report:
            curves = svd_curves(
                opened.subject,
                opened.decomposition,
                tolerance=SVD_TOLERANCE,
                sequences=SVD_SEQUENCES,
                seed=opened.recipe.seed,
                report=report,
            )
        data = write_rank_curves(opened.home, curves)
    ranks = {name: None if result is None else result["total_rank"] for name, result in data["result"].items()}
    return {"tolerance": data["tolerance"], "rank": ranks}


def seed_report(
    opened: LoadedRun, evaluation: dict[str, Any], baseline: dict[str, Any], broken: list[str]
) -> dict[str, Any]:
    """One seed of `spd.reproduce/1`: its verdict, and what of its evaluation no row of the table holds."""
    circuit = evaluation["circuit"]
    return {
        "seed": opened.recipe.seed,
        "run": str(opened.home.path),
        "passed": not broken,
        "broken": broken,
        "toy_accuracy": evaluation["accuracy"]["target"],
        "minutes": opened.home.metrics()[-1]["seconds"] / 60,  # that the decomposition trained
        "attention_kl_split": evaluation["attention_kl_split"],
        "attention": circuit["attention"],
        "controls": {name: one["all"] for name, one in circuit["controls"].items()},
        "svd": baseline,
    }


def slice_stability(runs: Sequence[LoadedRun], same_toy: bool) -> dict[str, Any]:
    """How well each seed's slices are found again by the others: as weights on one toy, by their effects on several."""
    from spdcli.measures.circuit_data import circuit_data
    from spdcli.paper.slice_matching import effect_signatures, stability, weight_signature

    signatures = []
    for opened in runs:
        decomposition = opened.decomposition
        stage = circuit_data(opened.subject, decomposition, STABILITY_SEQUENCES, 0.0, runs[0].recipe.seed)
        if same_toy:
            signatures.append({name: weight_signature(decomposition.of(name), stage.active[name]) for name in stage.g})
        else:
            signatures.append(effect_signatures(stage))
    slices = stability(signatures)
    scores: dict[str, list[float]] = {}
    for entry in slices:
        scores.setdefault(entry["slice"].split(":")[0], []).append(entry["score"])
    return {
        "definition": "weights" if same_toy else "effects",
        "matrices": {name: {"mean": sum(s) / len(s), "min": min(s), "slices": len(s)} for name, s in scores.items()},
        "slices": [{"seed": runs[entry["run"]].recipe.seed, **entry} for entry in slices],
    }


def failure(data: dict[str, Any]) -> SpdError:
    broken = [row["name"] for row in data["rows"] if row["bound"] and not row["agrees"]]
    passed = sum(seed["passed"] for seed in data["seeds"])
    which = "; ".join(broken) if broken else "no single one on most seeds"
    return SpdError(
        f"{passed} of {len(data['seeds'])} seeds meet every stated bound; broken: {which}",
        "the bounds are for the full-size task; spd eval RUN shows more of a seed",
    )


def report_tables(data: dict[str, Any]) -> list[Table | str]:
    """Ours beside the paper's, then seed by seed."""
    from rich.table import Table

    several = len(data["seeds"]) > 1
    table = Table(
        title=f"Table 1: ours{', mean of ' + str(len(data['seeds'])) + ' seeds' if several else ''}, and the paper's"
    )
    headings = ["", "ours", *(["spread", "least", "most"] if several else []), "paper", "bound", "agrees"]
    for heading in [*headings, *(["seeds"] if several else [])]:
        table.add_column(heading, justify="right" if heading else "left")
    for row in data["rows"]:
        spread = [number(row["spread"][key]) for key in ("std", "min", "max")] if several else []
        bound = row["bound"] or f"({row['agreement']})"
        share = [f"{row['share']:.0%}"] if several else []
        paper = "" if row["paper"] is None else number(row["paper"])
        table.add_row(row["name"], number(row["ours"]), *spread, paper, bound, "yes" if row["agrees"] else "NO", *share)
    parts: list[Table | str] = [table, "Bounds in brackets are not stated ones: they say what counts as agreeing."]
    for seed in data["seeds"]:
        ranks = ", ".join(f"{name} {'never' if r is None else f'{r:g}'}" for name, r in seed["svd"]["rank"].items())
        verdict = "meets every bound" if seed["passed"] else f"breaks {len(seed['broken'])} bounds"
        parts.append(f"seed {seed['seed']} {verdict}; rank left at a KL of {seed['svd']['tolerance']:g}: {ranks}")
    if data["stability"] is not None:
        told = ", ".join(f"{name} {one['mean']:.2f}" for name, one in data["stability"]["matrices"].items())
        parts.append(
            f"mean similarity of a slice to its match in other seeds, by {data['stability']['definition']}: {told}"
        )
    return parts


def number(value: float) -> str:
    """Three decimals, or an exponent where they would say nothing."""
    return f"{value:.3f}".rstrip("0").rstrip(".") if value == 0 or abs(value) >= 1e-2 else f"{value:.1e}"
