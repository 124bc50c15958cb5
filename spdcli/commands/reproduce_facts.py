"""`spd reproduce facts`: facts of a language model cut out by the slices that carry them, beside every baseline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdcli.commands.reproduce import REPORT
from spdcli.errors import SpdError, UsageError
from spdcli.files import read_json

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.console import Console
    from spdcli.recipe.reading import LoadedRecipe
    from spdcli.runs.directory import RunDirectory

TABLE = "facts.json"
LEGEND = "own, median and mean: means over seeds (own: least and largest too); other prompt and max: the largest."
NAMES = {
    "rule": "SPD, by rule",
    "effect": "SPD, by effect",
    "static": "static duals, whitened",
    "static_plain": "static duals",
    "direct": "direct, C⁻¹x",
    "optimised": "optimised (no location)",
    "random": "random, same norm",
    "singular": "top singular",
}


def reproduce_facts(
    console: Console,
    recipe: str,
    out: Path,
    seeds: int,
    pairs: list[str],
    settings: list[str],
    device: str | None,
    force: bool,
) -> tuple[dict[str, Any], SpdError | None]:
    """Every pair under every seed, into OUT/PAIR/seed-N. The report, and the failure if there is one."""
    from spdcli.files import write_json
    from spdcli.paper.fact_claims import fact_claims, method_rows
    from spdcli.paper.table1 import compare, passes
    from spdcli.runs.training import claimed_run

    wanted = [(pair, loaded) for pair in pairs for loaded in pair_recipes(recipe, settings, device, seeds, pair)]
    runs = [claimed_run(out / pair / f"seed-{loaded.recipe.seed}", loaded, force) for pair, loaded in wanted]
    tables: dict[int, dict[str, Any]] = {}
    for nth, (run, (pair, loaded)) in enumerate(zip(runs, wanted, strict=True), 1):
        console.note(f"{pair}, seed {loaded.recipe.seed} ({nth} of {len(runs)}) in {run.path}")
        tables.setdefault(loaded.recipe.seed, {})[pair] = table_of(run, loaded, pair, console)
    rows, broken = compare(list(tables.values()), fact_claims(pairs))
    data: dict[str, Any] = {
        "schema": "spd.reproduce/1",
        "recipe": recipe,
        "rows": rows,
        "passed": passes(broken),
        "methods": method_rows(list(tables.values())),
        "seeds": [
            {"seed": seed, "passed": not failures, "broken": failures, "tables": found}
            for (seed, found), failures in zip(tables.items(), broken, strict=True)
        ],
    }
    write_json(out / REPORT, data)
    return data, None if data["passed"] else failure(data)


def pair_recipes(recipe: str, settings: list[str], device: str | None, seeds: int, pair: str) -> list[LoadedRecipe]:
    """The recipe with the prompts of `pair`, once a seed; RecipeError unless it is for a language model."""
    import json

    from spdcli.paper.fact_claims import PAIRS
    from spdcli.recipe.reading import load_recipe

    prompts = f"data.prompts={json.dumps(PAIRS[pair].prompts)}"
    first = load_recipe(recipe, settings, device=device)
    if first.recipe.target.kind != "huggingface":
        raise first.error("target.kind", "[target] kind = 'induction': facts are those of a language model")
    start = first.recipe.seed
    return [load_recipe(recipe, [*settings, prompts], seed=start + k, device=device) for k in range(seeds)]


def table_of(run: RunDirectory, loaded: LoadedRecipe, pair: str, console: Console) -> list[dict[str, Any]]:
    """The table of one run, trained and measured now unless that was done before."""
    found = read_json(run / TABLE)
    if found.get("schema") == "spd.facts.table/1" and (run / "decomposition.safetensors").exists():
        console.note(f"{run.path} is measured already")
        return found["table"]
    from spdcli.api import prepared
    from spdcli.edits.facts_file import load_facts
    from spdcli.files import load_tensors, write_json
    from spdcli.paper.fact_claims import PAIRS
    from spdcli.paper.fact_table import fact_table, open_table
    from spdcli.runs.decomposition import load_decomposition
    from spdcli.runs.directory import DECOMPOSITION
    from spdcli.runs.training import finish_run

    recipe = loaded.recipe
    with console.progress() as report:
        subject = prepared(run, loaded, report)
        finish_run(run, loaded, lambda: subject, report)
    decomposition = load_decomposition(recipe, subject, load_tensors(run / DECOMPOSITION)[0])
    from spdcli.records import plain

    ridge, seed = recipe.slices.ridge, recipe.seed
    context = open_table(subject, decomposition, load_facts(), PAIRS[pair].subjects, ridge, seed)
    table = plain(fact_table(context))
    write_json(run / TABLE, {"schema": "spd.facts.table/1", "table": table})
    return table


def failure(data: dict[str, Any]) -> SpdError:
    broken = [row["name"] for row in data["rows"] if row["bound"] and not row["agrees"]]
    passed = sum(seed["passed"] for seed in data["seeds"])
    which = "; ".join(broken) if broken else "no single one on most seeds"
    return SpdError(f"{passed} of {len(data['seeds'])} seeds meet every stated bound; broken: {which}")


def checked_pairs(asked: list[str] | None) -> list[str]:
    """The pairs that are asked for, all of them if none is; UsageError for one that is not there."""
    from spdcli.paper.fact_claims import PAIRS

    for name in asked or ():
        if name not in PAIRS:
            raise UsageError(f"--pair {name}: expected one of {', '.join(PAIRS)}")
    return list(dict.fromkeys(asked)) if asked else list(PAIRS)


def fact_tables(data: dict[str, Any]) -> list[Table | str]:
    """One table a prompt with every method, then the bounds."""
    from rich.table import Table

    parts: list[Table | str] = []
    several = len(data["seeds"]) > 1
    for prompt in dict.fromkeys(row["prompt"] for row in data["methods"]):
        own = [row for row in data["methods"] if row["prompt"] == prompt]
        table = Table(title=f"{prompt.removesuffix(own[0]['token'])} …{own[0]['token']}: relative changes")
        table.add_column("edit", no_wrap=True)
        for heading in ("own answer", "other", "facts: median", "mean", "max"):
            table.add_column(heading, justify="right")
        for row in own:
            table.add_row(
                NAMES[row["method"]],
                spread(row["own"], several, "+.0%"),
                f"{row['others']['max']:.1%}",
                *(f"{row[f'{key}_relative_change']['mean']:.1%}" for key in ("median", "mean")),
                f"{row['max_relative_change']['max']:.0%}",
            )
        parts.append(table)
    bounds = Table(title="Bounds (in brackets: not stated ones)")
    for heading in ("", "ours", "bound", "holds on"):
        bounds.add_column(heading, justify="right" if heading else "left")
    for row in data["rows"]:
        ours = "no slice" if math.isnan(row["ours"]) else f"{row['ours']:+.1%}"
        bounds.add_row(row["name"], ours, row["bound"] or f"({row['agreement']})", f"{row['share']:.0%} of seeds")
    return [*parts, LEGEND, bounds]


def spread(values: dict[str, float], several: bool, form: str) -> str:
    """A mean, and of several seeds the least and the largest value."""
    mean = format(values["mean"], form)
    return f"{mean} ({format(values['min'], form)} to {format(values['max'], form)})" if several else mean
