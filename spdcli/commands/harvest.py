"""`spd harvest`: what every slice of a run does over text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from spdcli.commands.options import Device, Json, MatrixPattern, Quiet, RunPath, Threshold, Verbose, make_console

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.measures.harvest import Harvest

Text = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Read this text: a file, a directory, .jsonl, .parquet, datasets:NAME; the run's own if not given.",
        show_default=False,
    ),
]
Field = Annotated[str, typer.Option("--field", help="Where rows of that text have theirs.")]
Tokens = Annotated[
    int, typer.Option("--tokens", min=1, max=10**12, help="Read about so many tokens, or all there are.")
]


def harvest(
    run: RunPath,
    data: Text = None,
    field: Field = "text",
    tokens: Tokens = 100_000,
    matrix: MatrixPattern = None,
    threshold: Threshold = 0.0,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Gather what every slice does over text: how often it is active, where most, and with what.

    Each slice's density, mean importance, strongest contexts, preferred tokens and
    partners are written to RUN/harvest; `spd inspect RUN --slice` and `spd search` read them.
    """
    console = make_console(json, quiet, verbose)
    from spdcli import api
    from spdcli.measures.harvest_files import every_slice
    from spdcli.runs.directory import HARVEST

    opened = api.load(run, device)
    with console.progress() as report:
        gathered = opened.harvest(
            data, field=field, tokens=tokens, matrices=matrix or ["*"], threshold=threshold, progress=report
        )
    rows = list(every_slice(gathered, opened.subject.token_text)) if json else []
    console.show({"schema": "spd.harvest/1", "run": run, "tokens": gathered.tokens, "slices": rows}, summary(gathered))
    console.result(run / HARVEST)


def summary(gathered: Harvest) -> Table:
    """A row a matrix: how many of its slices are ever active, and how often."""
    from rich.table import Table

    table = Table(
        title=f"Slices over {gathered.tokens} tokens", caption="density: the share of tokens where it is active"
    )
    for heading in ("matrix", "slices", "ever active", "active a token", "median density", "largest"):
        table.add_column(heading, justify="left" if heading == "matrix" else "right")
    start = 0
    for name, count in gathered.matrices.items():
        own = gathered.density[start : start + count]
        start += count
        alive = own[own > 0]
        median = f"{alive.median():.2%}" if len(alive) else ""
        table.add_row(name, str(count), str(len(alive)), f"{own.sum():.1f}", median, f"{own.max():.2%}")
    return table
