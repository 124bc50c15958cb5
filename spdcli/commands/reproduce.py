"""`spd reproduce`: the paper's experiments from recipe to table, and whether they hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spdcli.commands.options import Device, Force, Json, Quiet, Set, Verbose, make_console
from spdcli.errors import UsageError

if TYPE_CHECKING:
    pass

REPORT = "reproduce.json"

Experiment = Annotated[
    Literal["induction", "facts"], typer.Argument(help="What to reproduce.", metavar="induction|facts")
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="A recipe file, or a shipped recipe's name; induction-quick or smollm2-facts if not given.",
        show_default=False,
    ),
]
PairOption = Annotated[
    list[str] | None,
    typer.Option("--pair", help="Of facts: athletes, painters or landmarks; may be given again.", show_default="all"),
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="The directory for the seeds' runs and the report.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="How many seeds, counted from the recipe's own.")]
SameToy = Annotated[bool, typer.Option("--same-toy", help="Decompose the first seed's toy under every seed.")]
Sequences = Annotated[int, typer.Option("--sequences", min=2, help="Fresh toy sequences to measure each seed on.")]


def reproduce(
    experiment: Experiment,
    recipe: RecipeOption = None,
    out: OutFolder = Path("reproduce"),
    seeds: Seeds = 1,
    same_toy: SameToy = False,
    sequences: Sequences = 8192,
    pair: PairOption = None,
    set_: Set = None,
    device: Device = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Reproduce one of the paper's experiments.

    induction: for every seed toy, decomposition, evaluation, SVD baseline and mechanism, into
    OUT/seed-N, compared with Table 1.

    facts: for pairs of facts that a language model knows, decomposition, then suppression of at
    most two slices of the first MLP, into OUT/PAIR/seed-N, beside every baseline.

    What is finished is reused while its recipe is the same, so that the same command goes on
    after an interruption. Exit code 1 when fewer than 80 % of the seeds meet every stated bound.
    """
    console = make_console(json, quiet, verbose)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a directory", "name another with --out")
    if experiment == "facts":
        from spdcli.commands.reproduce_facts import checked_pairs, fact_tables, reproduce_facts

        if same_toy:
            raise UsageError("--same-toy is for the induction experiment")
        pairs = checked_pairs(pair)
        name = recipe or "smollm2-facts"
        data, failed = reproduce_facts(console, name, out, seeds, pairs, set_ or [], device, force)
        console.show(data, *fact_tables(data))
    else:
        if pair:
            raise UsageError("--pair is for the facts experiment")
        name = recipe or "induction-quick"
        from spdcli.commands.reproduce_induction import report_tables, reproduce_induction

        data, failed = reproduce_induction(console, name, out, seeds, same_toy, sequences, set_ or [], device, force)
        console.show(data, *report_tables(data))
    console.result(out)
    if failed is not None:
        raise failed
