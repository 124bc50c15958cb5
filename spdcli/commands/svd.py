"""`spd svd`: a run's slices against greedy SVD pruning."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from spdcli.commands.opening import opened
from spdcli.commands.options import Device, Json, Quiet, RunPath, Seed, Verbose, make_console
from spdcli.errors import UsageError
from spdcli.measures.svd_methods import METHODS

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.measures.svd import RankCurves

    Method = str
else:
    Method = StrEnum("Method", {name: name for name in METHODS})  # typer has no lists of Literal

Tolerance = Annotated[float, typer.Option("--tolerance", min=0.0, help="KL from the target that is allowed, in nats.")]
Sequences = Annotated[int, typer.Option("--sequences", min=1, max=10**6, help="Fresh toy sequences to measure on.")]
MethodOption = Annotated[
    list[Method] | None,
    typer.Option(
        "--method",
        metavar="METHOD",
        help="Only this method; may be given again. "
        + "; ".join(f"{name} {method.description}" for name, method in METHODS.items())
        + ".",
        show_default=False,
    ),
]
Step = Annotated[
    int | None,
    typer.Option(
        "--step",
        min=1,
        max=10**6,
        help="Singular values that a greedy round removes; 1 is Algorithm 2. About 128 rounds if not given.",
        show_default=False,
    ),
]


def svd(
    run: RunPath,
    tolerance: Tolerance = 1e-3,
    sequences: Sequences = 512,
    method: MethodOption = None,
    step: Step = None,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare a run's slices with greedy SVD pruning: KL against rank (Algorithm 2, Figure 2).

    Each method gives a curve, from everything kept to nothing. The rank of a greedy
    method is that of all matrices together; that of spd and spd_masked is the number
    of slices kept, that of spd_per_position the mean number that a position uses.

    The toy is measured on fresh sequences, a language model on its prompts.
    """
    console = make_console(json, quiet, verbose)
    if not math.isfinite(tolerance):
        raise UsageError(f"--tolerance {tolerance}: not a number of nats", "give a number such as 1e-3")
    from spdcli.figures.run_files import SVD_FIGURE, write_rank_curves
    from spdcli.measures.svd import svd_curves

    loaded = opened(console, run, device)
    methods = [name for name in METHODS if not method or name in method]
    with console.progress() as report:
        curves = svd_curves(
            loaded.subject, loaded.decomposition, methods, tolerance, sequences, step, loaded.seed_or(seed), report
        )
    data = write_rank_curves(loaded, curves)
    console.show(data, rank_table(curves))
    console.result(run / SVD_FIGURE)


def rank_table(curves: RankCurves) -> Table:
    """What each method has left at the tolerance, a row a matrix."""
    from rich.table import Table

    bound = f"{curves.measure} of at most {curves.tolerance:g}"
    table = Table(title=f"Left at a {bound} over {curves.looked_at} predictions")
    table.add_column("")
    for method in curves.result:
        table.add_column(curves.legend[method].replace(": ", ":\n"), justify="right")
    results = list(curves.result.values())
    for name in next((result.ranks for result in results if result), ()):
        table.add_row(name, *(_rank(result.ranks[name] if result else None) for result in results))
    table.add_section()
    table.add_row("total", *(_rank(result.total_rank if result else None) for result in results))
    lowest = [min(point.kl for point in curve) for curve in curves.curves.values()]
    kls = (f"{r.kl:.1e}" if r else f"{low:.1e} at best" for r, low in zip(results, lowest, strict=True))
    table.add_row(curves.measure, *kls)
    return table


def _rank(rank: float | None) -> str:
    return "" if rank is None else f"{rank}" if isinstance(rank, int) else f"{rank:.3f}"
