"""`spd compare`: what a setting of a recipe costs and buys, at equal steps and at equal time."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spdcli.commands.options import Device, Force, Json, Quiet, RecipeName, Seed, Set, Verbose, make_console
from spdcli.console import Console
from spdcli.engine.tables import LOSSES, losses_where
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.recipe.reading import LoadedRecipe

REPORT = "compare.json"
AS_IT_IS = "the recipe as it is"
SHOWN = sorted(losses_where(lambda loss: loss.compared), key=lambda name: not LOSSES[name].in_grid)

With = Annotated[
    list[str],
    typer.Option("--with", metavar="KEY=VALUE", help="A setting to compare; may be given again.", show_default=False),
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="The directory for the runs and the report.")]
Sequences = Annotated[int, typer.Option("--sequences", min=2, help="Fresh toy sequences to measure each run on.")]


def compare(
    recipe: RecipeName,
    with_: With,
    out: OutFolder = Path("compare"),
    sequences: Sequences = 2048,
    set_: Set = None,
    device: Device = None,
    seed: Seed = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Decompose by a recipe as it is and with each setting changed, at equal steps and at equal time.

    A setting that makes steps faster gets a second run of as many steps as fit the
    time that the recipe as it is took. What is finished is reused. Compare on a
    machine that does nothing else: seconds are measured.
    """
    console = make_console(json, quiet, verbose)
    from spdcli.files import write_json
    from spdcli.recipe.reading import load_recipe, parse_override

    settings, changes = list(set_ or []), [parse_override(one, "--with") for one in with_]
    given = [load_recipe(recipe, [*settings, one], seed=seed, device=device) for one in changes]  # errors come first
    base = load_recipe(recipe, settings, seed=seed, device=device)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a directory", "name another with --out")
    exact = measure(out / "as-it-is", AS_IT_IS, base, sequences, force, console)
    if base.recipe.target.kind == "induction" and base.recipe.target.path is None:
        settings.append(f"target.path={jsonlib.dumps(str((out / 'as-it-is').resolve()))}")
    rows = [exact]
    for number, (one, loaded) in enumerate(zip(with_, given, strict=True), 1):
        again = load_recipe(recipe, [*settings, one], seed=seed, device=device)
        rows.append(measure(out / f"{number}-equal-steps", one, again, sequences, force, console))
        steps = round(loaded.recipe.decompose.steps * exact["seconds"] / rows[-1]["seconds"])
        if steps > loaded.recipe.decompose.steps:
            longer = load_recipe(recipe, [*settings, one, f"decompose.steps={steps}"], seed=seed, device=device)
            rows.append(measure(out / f"{number}-equal-time", one, longer, sequences, force, console))
    data = {"schema": "spd.compare/1", "recipe": recipe, "settings": list(set_ or []), "rows": rows}
    write_json(out / REPORT, data)
    console.show(data, table(rows))
    console.result(out)


def measure(
    folder: Path, name: str, loaded: LoadedRecipe, sequences: int, force: bool, console: Console
) -> dict[str, Any]:
    """One run, trained and evaluated unless it is there already."""
    from spdcli.api import finished
    from spdcli.measures.evaluation import evaluate_without_circuit
    from spdcli.runs.training import claimed_run

    console.note(f"{name}, {loaded.recipe.decompose.steps} steps, in {folder}")
    with console.progress() as report:
        opened = finished(claimed_run(folder, loaded, force), loaded, report)
    last = opened.home.metrics()[-1]
    evaluation = evaluate_without_circuit(opened.subject, opened.decomposition, sequences, 0.0, loaded.recipe.seed)
    return {
        "with": name,
        "run": str(folder),
        "steps": last["step"],
        "seconds": last["seconds"],
        "active": sum(last["active"].values()),
        "total_active": evaluation.total_active,
        "metrics": evaluation.metrics,
        "standard_error": evaluation.standard_error,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """One row a run; L0 is active slices a position, all of them slices that are active somewhere."""
    from rich.table import Table

    made = Table(title="At equal steps, then at equal time")
    made.add_column("", overflow="fold", ratio=1)
    for heading in ("steps", "seconds", "s/step", "L0", "active"):
        made.add_column(heading, justify="right", no_wrap=True)
    for name in SHOWN:
        made.add_column(name.replace("_", " "), justify="right", width=max(7, *map(len, name.split("_"))))
    for row in rows:
        made.add_row(
            row["with"],
            str(row["steps"]),
            f"{row['seconds']:.0f}",
            f"{row['seconds'] / row['steps']:.3g}",
            f"{row['active']:.2f}",
            str(row["total_active"]),
            *(f"{row['metrics'][name]:.1e}" for name in SHOWN),
        )
    return made
