"""`spd plan`: what a recipe will cost, before the work begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spdcli.commands.options import Device, Json, Nproc, Quiet, RecipeName, Set, Verbose, make_console

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.costs.estimate import Estimate


def plan(
    recipe: RecipeName,
    set_: Set = None,
    device: Device = None,
    nproc: Nproc = 1,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what a recipe will cost: parameters, memory, operations, time.

    A step is gone through without numbers; where it fits, a few steps are
    then made on random weights. Exits 1 where it does not fit.
    With --nproc it is what each of the processes computes, holds and sends.
    """
    from spdcli.recipe.reading import load_recipe

    console = make_console(json, quiet, verbose)
    loaded = load_recipe(recipe, set_ or [], device=device)
    from spdcli.costs.estimate import amount, estimate
    from spdcli.costs.room import does_not_fit, refuse_beyond_reason
    from spdcli.records import plain
    from spdcli.runs.subject import choose_device

    with console.progress("a step is counted without numbers, then a few are made"):
        on = choose_device(loaded.recipe.device)
        refuse_beyond_reason(loaded.recipe, on)
        costs = estimate(loaded, on, processes=nproc)
    console.show({"schema": "spd.plan/1", **plain(costs)}, table(costs))
    if not costs.fits:
        raise does_not_fit(loaded.recipe, costs.bytes.total, costs.free_bytes, costs.change, nproc)
    if costs.divided:
        console.result(f"fits: {nproc} processes of {amount(costs.bytes.total)} each")
        return
    time = "no step could be timed: memory ended" if costs.seconds is None else span(costs.seconds)
    console.result(f"fits: {amount(costs.bytes.total)}, {time}")


def span(seconds: float) -> str:
    """A time as people say it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def table(costs: Estimate) -> Table:
    """One row a number."""
    from rich.table import Table

    each = f"; each of {costs.divided.processes} processes" if costs.divided else ""
    title = f"{costs.recipe}: {costs.matrices} matrices, {costs.tokens} tokens a step{each}"
    from spdcli.costs.estimate import amount

    rows = Table(title=title, show_header=False)
    rows.add_column("")
    rows.add_column("", justify="right")
    for name, count in vars(costs.parameters).items():
        rows.add_row(f"parameters of {name}", f"{count:,}")
    rows.add_section()
    for name, size in vars(costs.bytes).items():
        rows.add_row(f"memory: {name}", amount(size))
    rows.add_row("memory that is free", amount(costs.free_bytes))
    rows.add_section()
    rows.add_row("operations of a step", f"{costs.flops_per_step / 1e9:,.1f} GFLOP")
    if costs.divided:
        rows.add_row("sequences of a step", f"{costs.divided.sequences:,}")
        rows.add_row("rows of its plan", f"{costs.divided.rows:,}")
        rows.add_row("sent in a step", amount(costs.divided.sent_per_step))
    if costs.seconds is not None:
        rows.add_row("a step", f"{costs.seconds_per_step:.3g} s")
        training = f", after {costs.toy_steps} of the toy's" if costs.toy_steps else ""
        rows.add_row(f"all {costs.steps} steps{training}", span(costs.seconds))
    return rows
