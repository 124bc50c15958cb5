"""`spd bench`: how fast a step is on this machine, and in how much memory."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spdcli.commands.options import Device, Json, Quiet, Verbose, make_console
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table


class Benchmark(StrEnum):
    """The benchmarks of `costs.cases`, without importing it."""

    importance = "importance"
    step = "step"
    scaling = "scaling"
    allocator = "allocator"
    memory = "memory"


What = Annotated[
    Benchmark,
    typer.Argument(
        help="importance: Table 2; step: one plan against one by one; scaling: with matrices, tokens, C; "
        "allocator: with and without its thresholds; memory: attention at 5120 and 10240 positions.",
        show_default=False,
    ),
]
Cases = Annotated[
    list[str] | None,
    typer.Option("--case", "-c", help="Only cases whose names begin like this; * is wild.", show_default=False),
]
Rounds = Annotated[
    int,
    typer.Option("--rounds", "-n", min=1, help="Steps of every case that are measured, in turns, after a first one."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of every process; torch's choice if not given.")
]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        min=1,
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
    from spdcli.costs.cases import Wanted, groups_of
    from spdcli.machine import describe
    from spdcli.runs.subject import choose_device

    chosen = choose_device(device or "auto")
    groups = groups_of(what, Wanted(sizes, batch, chosen.type, case or [], per_loss))
    if not groups:
        raise UsageError(f"no case of {what.value} is called like {', '.join(case or [])}")
    for group in groups:
        console.debug(" | ".join(one.name for one in group.cases))
    with console.live() as live:
        found = measure(groups, Conditions(rounds, chosen.type, threads), live.update)
    machine = describe(chosen) | ({} if threads is None else {"threads": threads})
    console.show(
        {"schema": "spd.bench/1", "benchmark": what.value, "machine": machine, **found},
        table(found["rows"], f"spd bench {what.value}: {title(machine)}"),
        *(f"{name}: {ratio:.2f}" for name, ratio in found["ratios"].items()),
    )
    for row in found["rows"]:
        if "skipped" in row:
            console.note(f"{row['name']}: not measured: {row['skipped']}")
        elif quiet:
            console.result(f"{row['name']}: {row['seconds']:.4g} s")


def parse_lengths(text: str) -> list[int]:
    """`16,64` as numbers; UsageError where a part is none."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 4 for part in parts):
        raise UsageError(
            f"--lengths {text}: not a list of sequence lengths of at least 4", "as in --lengths 16,64,1024"
        )
    return [int(part) for part in parts]


def title(machine: dict[str, Any]) -> str:
    """The machine in a few words."""
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    return f"{where}, torch {machine['torch']}"


def table(rows: list[dict[str, Any]], heading: str) -> Table:
    """One row a case."""
    from rich.table import Table

    made = Table(title=heading)
    made.add_column("case")
    columns = ("batch", "s/step", "it/s", "peak GB", "GFLOP", "GB touched", "GFLOP/s", "of a product")
    batches = any("batch" in row for row in rows)
    for column in columns if batches else columns[1:]:
        made.add_column(column, justify="right")
    for row in rows:
        batch = [str(row["batch"])] if batches else []
        if "skipped" in row:
            made.add_row(row["name"], *batch, "skipped")
            continue
        cells = [
            f"{row['seconds']:.3g}",
            f"{1 / row['seconds']:.3g}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['flops'] / 1e9:.1f}",
            f"{row['bytes'] / 1e9:.1f}",
            f"{row['flops_per_second'] / 1e9:.1f}",
            f"{row['product_share']:.0%}",
        ]
        made.add_row(row["name"], *batch, *cells)
    return made
