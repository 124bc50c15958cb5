"""The facts experiment of section 6.2: facts of a language model cut out by the slices that carry them.

Every pair of facts is decomposed under every seed into OUT/PAIR/seed-N, then cut beside every baseline. What is
finished is reused while its recipe is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdcli.api import prepared
from spdcli.disk import write_json
from spdcli.edits.facts_file import Facts
from spdcli.paper.fact_claims import MethodRow, Pair, Tables, fact_claims, method_rows
from spdcli.paper.fact_table import fact_table, open_table
from spdcli.paper.verdict import REPORT, SCHEMA, ClaimRow, Verdict, judge
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.reading import LoadedRecipe, load_recipe
from spdcli.records import plain
from spdcli.runs.decomposition import read_decomposition
from spdcli.runs.directory import DECOMPOSITION, RunDirectory
from spdcli.runs.opening import claimed_run
from spdcli.runs.results import kept_result, write_result
from spdcli.runs.training import finish_run

TABLE, TABLE_SCHEMA = "facts.json", "spd.facts.table/1"


@dataclass(frozen=True)
class FactSeed:
    """One seed: whether it meets every stated bound, those that it breaks, and by pair its table, as JSON."""

    seed: int
    passed: bool
    broken: list[str]
    tables: Tables


@dataclass(frozen=True)
class FactExperiment:
    """`spd.reproduce/1` of the facts: a row a claim, a row a method and prompt, and what each seed says."""

    recipe: str
    rows: list[ClaimRow]
    passed: bool
    methods: list[MethodRow]
    seeds: list[FactSeed]


def reproduce_facts(
    recipe: str,
    out: Path,
    pairs: Mapping[str, Pair],
    facts: Facts,
    seeds: int = 1,
    settings: Sequence[str] = (),
    device: str | None = None,
    force: bool = False,
    report: Report = silent,
) -> tuple[FactExperiment, Verdict]:
    """Every pair under every seed, counted from the recipe's own; writes OUT/reproduce.json.

    `facts` are those that a cut should leave alone; `settings` change the recipe as `--set` does. RecipeError unless it
    is for a language model; UsageError for a run by another recipe, unless `force` replaces it.
    """
    jobs = [
        (name, loaded) for name, pair in pairs.items() for loaded in pair_recipes(recipe, settings, device, seeds, pair)
    ]
    runs = [claimed_run(out / name / f"seed-{loaded.recipe.seed}", loaded, force, report) for name, loaded in jobs]
    tables: dict[int, dict[str, Any]] = {}
    for nth, (run, (name, loaded)) in enumerate(zip(runs, jobs, strict=True), 1):
        report(Progress(f"{name}, seed {loaded.recipe.seed} ({nth} of {len(runs)}) in {run.path}"))
        table = table_of(run, loaded, pairs[name], facts, report)
        tables.setdefault(loaded.recipe.seed, {})[name] = table
    verdict = judge(list(tables.values()), fact_claims(pairs))
    entries = [
        FactSeed(seed, not names, names, tables[seed]) for seed, names in zip(tables, verdict.broken, strict=True)
    ]
    experiment = FactExperiment(recipe, verdict.rows, verdict.passed, method_rows(list(tables.values())), entries)
    write_json(out / REPORT, {"schema": SCHEMA, **plain(experiment)})
    return experiment, verdict


def pair_recipes(
    recipe: str, settings: Sequence[str], device: str | None, seeds: int, pair: Pair
) -> list[LoadedRecipe]:
    """The recipe with the prompts of `pair`, once a seed; RecipeError unless it is for a language model."""
    prompts = f"data.prompts={json.dumps(pair.prompts)}"
    first = load_recipe(recipe, settings, device=device)
    if first.recipe.target.kind != "huggingface":
        raise first.error("target.kind", "[target] kind = 'induction': facts are those of a language model")
    start = first.recipe.seed
    return [load_recipe(recipe, [*settings, prompts], seed=start + k, device=device) for k in range(seeds)]


def table_of(run: RunDirectory, loaded: LoadedRecipe, pair: Pair, facts: Facts, report: Report) -> list[dict[str, Any]]:
    """The table of one run as JSON, trained and measured now unless that was done before."""
    before = kept_result(run, TABLE, report)
    if before.get("schema") == TABLE_SCHEMA and (run / DECOMPOSITION).exists():
        report(Progress(f"{run.path} is measured already"))
        return before["table"]
    subject = prepared(run, loaded, report)
    finish_run(run, loaded, lambda: subject, report)
    decomposition = read_decomposition(run / DECOMPOSITION, loaded.recipe, subject, run.way_back)
    ridge, seed = loaded.recipe.slices.ridge, loaded.recipe.seed
    context = open_table(subject, decomposition, facts, pair.subjects, ridge, seed)
    table = plain(fact_table(context))
    write_result(run, decomposition, TABLE, {"schema": TABLE_SCHEMA, "table": table})
    return table
