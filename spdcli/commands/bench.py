"""`spd bench`: how fast a step is on this machine, and in how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spdcli.commands.options import Device, Json, Quiet, Verbose, make_console
from spdcli.costs.cases import BENCHMARKS
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.costs.bench import Row
    from spdcli.machine import Machine

    BenchmarkName = str
else:
    BenchmarkName = Literal[tuple(BENCHMARKS)]

What = Annotated[
    BenchmarkName,
    typer.Argument(
        help=f"{'; '.join(f'{name}: {benchmark.about}' for name, benchmark in BENCHMARKS.items())}.",
        show_default=False,
    ),
]
Cases = Annotated[
    list[str] | None,
    typer.Option("--case", "-c", help="Only cases whose names begin like this; * is wild.", show_default=False),
]
Rounds = Annotated[
    int,
    typer.Option(
        "--rounds", "-n", min=1, max=10**6, help="Steps of every case that are measured, in turns, after a first one."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=1024, help="Threads of every process; torch's choice if not given."),
]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        min=1,
        max=10**6,
        help="Sequences of importance and memory: 64 is Table 2 (4 at 10240); if not given, 4096 tokens in all.",
        show_default=False,
    ),
]
Lengths = Annotated[str, typer.Option("--lengths", help="Sequence lengths of importance.")]
PerLoss = Annotated[bool, typer.Option("--per-loss", help="Of step: every reconstruction loss by itself.")]


def bench(
    what: What,
    case: Cases = None,
    rounds: Rounds = 3,
    batch: Batch = None,
    lengths: Lengths = "16,64,1024,10240",
    per_loss: PerLoss = False,
    threads: Threads = None,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure steps on this machine: seconds, memory, operations, rates.

    Every case has random weights and a process of its own. Cases that are
    compared take turns; medians are shown, and ratios are of the same run.
    Long cases of importance make fewer steps than --rounds, and one that
    needs too much memory is not started.
    Peaks are of the whole process, the libraries' 0.2 to 0.4 GB included.
    """
    console = make_console(json, quiet, verbose)
    sizes = parse_lengths(lengths)
    from spdcli.costs.bench import Conditions, measure
    from spdcli.costs.cases import Options, groups_of
    from spdcli.machine import describe
    from spdcli.runs.subject import choose_device

    place = choose_device(device or "auto")
    groups = groups_of(what, Options(sizes, batch, place.type, case or [], per_loss))
    if not groups:
        raise UsageError(f"no case of {what} is called like {', '.join(case or [])}")
    for group in groups:
        console.debug(" | ".join(one.name for one in group.cases))
    with console.progress() as report:
        results = measure(groups, Conditions(rounds, place.type, threads), report)
    machine = describe(place)
    if threads is not None:
        machine = replace(machine, threads=threads)
    rows = [row_data(row) for row in results.rows]
    console.show(
        {"schema": "spd.bench/1", "benchmark": what, "machine": machine, "rows": rows, "ratios": results.ratios},
        table(results.rows, f"spd bench {what}: {title(machine)}"),
        *(f"{name}: {ratio:.2f}" for name, ratio in results.ratios.items()),
    )
    for row in results.rows:
        if row.measurement is None:
            console.note(f"{row.case.name}: not measured: {row.skipped}")
        elif quiet:
            console.result(f"{row.case.name}: {row.measurement.seconds:.4g} s")


def parse_lengths(text: str) -> list[int]:
    """`16,64` as numbers; UsageError where a part is none."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 4 for part in parts):
        raise UsageError(
            f"--lengths {text}: not a list of sequence lengths of at least 4", "as in --lengths 16,64,1024"
        )
    return [int(part) for part in parts]


def title(machine: Machine) -> str:
    """The machine in a few words."""
    where = machine.gpu or f"{machine.processor}, {machine.threads} threads"
    return f"{where}, torch {machine.torch}"


def row_data(row: Row) -> dict[str, Any]:
    """A row as `--json` shows it: the measurement's numbers, or why there are none, and the case."""
    case = row.case
    about = {"way": case.way, "recipe": case.recipe, "settings": case.settings, "keep_freed": case.keep_freed}
    if row.measurement is None:
        return {"name": case.name, **about, **case.labels, "skipped": row.skipped}
    return {"name": case.name, **vars(row.measurement), **about, **case.labels}


def table(rows: Sequence[Row], heading: str) -> Table:
    """One row a case."""
    from rich.table import Table

    cases = Table(title=heading)
    cases.add_column("case")
    columns = ("batch", "s/step", "it/s", "peak GB", "GFLOP", "GB touched", "GFLOP/s", "of a product")
    batches = any("batch" in row.case.labels for row in rows)
    for column in columns if batches else columns[1:]:
        cases.add_column(column, justify="right")
    for row in rows:
        batch, numbers = [str(row.case.labels["batch"])] if batches else [], row.measurement
        if numbers is None:
            cases.add_row(row.case.name, *batch, "skipped")
            continue
        cells = [
            f"{numbers.seconds:.3g}",
            f"{1 / numbers.seconds:.3g}",
            f"{numbers.peak_bytes / 1e9:.2f}",
            f"{numbers.flops / 1e9:.1f}",
            f"{numbers.bytes / 1e9:.1f}",
            f"{numbers.flops_per_second / 1e9:.1f}",
            f"{numbers.product_share:.0%}",
        ]
        cases.add_row(row.case.name, *batch, *cells)
    return cases
