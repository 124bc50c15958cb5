"""`spd svd`: a run's slices against greedy SVD pruning."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spdcli.commands.options import Device, Json, Quiet, RunPath, Seed, Verbose, make_console
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table


class Method(StrEnum):
    """The methods of `analysis.svd`, without importing it."""

    greedy_svd = "greedy_svd"
    weighted_svd = "weighted_svd"
    spd = "spd"
    spd_masked = "spd_masked"
    spd_per_position = "spd_per_position"


Tolerance = Annotated[float, typer.Option("--tolerance", min=0.0, help="KL from the target that is allowed, in nats.")]
Sequences = Annotated[int, typer.Option("--sequences", min=1, help="Fresh toy sequences to measure on.")]
Methods = Annotated[
    list[Method] | None,
    typer.Option("--method", help="Only this method; may be given again.", show_default=False),
]
Step = Annotated[
    int | None,
    typer.Option(
        "--step",
        min=1,
        help="Singular values that a greedy round removes; 1 is Algorithm 2. About 128 rounds if not given.",
        show_default=False,
    ),
]


def svd(
    run: RunPath,
    tolerance: Tolerance = 1e-3,
    sequences: Sequences = 512,
    method: Methods = None,
    step: Step = None,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare a run's slices with greedy SVD pruning: KL against rank (Algorithm 2, Figure 2).

    greedy_svd and weighted_svd remove, round by round, the singular value that
    matters least; the second weights them by what the matrices read. spd removes
    slices everywhere, the least important first: its rank is their number.
    spd_masked removes them likewise and masks those kept by their importance.
    spd_per_position removes them where their importance is below a threshold:
    its rank is the mean number of slices that a position uses.

    The toy is measured on fresh sequences, a language model on its prompts.
    """
    console = make_console(json, quiet, verbose)
    if not math.isfinite(tolerance):
        raise UsageError(f"--tolerance {tolerance}: not a number of nats", "give a number such as 1e-3")
    from spdcli.figures.curves import save_rank_curves
    from spdcli.files import write_json
    from spdcli.measures.greedy_svd import LEGEND, compare
    from spdcli.measures.rank_curves import curve_data
    from spdcli.runs.directory import FIGURES
    from spdcli.runs.loading import load

    loaded = load(run, device)
    console.debug(str(loaded))
    bench = curve_data(loaded.subject, loaded.decomposition, sequences, loaded.recipe.seed if seed is None else seed)
    methods = [name.value for name in Method if not method or name in method]
    with console.live() as line:
        found = compare(bench, methods, tolerance, step, lambda name, done, of: line.update(LEGEND[name], done, of))
    data: dict[str, Any] = {"schema": "spd.svd/1", "run": str(run), **found}
    figures = save_rank_curves(found["curves"], LEGEND, tolerance, run / FIGURES)
    write_json(run / FIGURES / "svd.json", data)
    console.show(data, rank_table(data))
    console.result(figures[0])


def rank_table(data: dict[str, Any]) -> Table:
    """What each method has left at the tolerance, a row a matrix."""
    from rich.table import Table

    table = Table(title=f"Left at a KL of at most {data['tolerance']:g} over {data['looked_at']} predictions")
    table.add_column("")
    for method in data["result"]:
        table.add_column(data["legend"][method].replace(": ", ":\n"), justify="right")
    results = list(data["result"].values())
    for name in next((result["ranks"] for result in results if result), ()):
        table.add_row(name, *(_number(result and result["ranks"][name]) for result in results))
    table.add_section()
    table.add_row("total", *(_number(result and result["total_rank"]) for result in results))
    lowest = [min(point["kl"] for point in curve) for curve in data["curves"].values()]
    kls = (f"{r['kl']:.1e}" if r else f"{low:.1e} at best" for r, low in zip(results, lowest, strict=True))
    table.add_row("KL", *kls)
    return table


def _number(rank: float | None) -> str:
    return "" if rank is None else f"{rank}" if isinstance(rank, int) else f"{rank:.3f}"
