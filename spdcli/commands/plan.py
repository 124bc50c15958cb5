"""`spd plan`: what a recipe will cost, before the work begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spdcli.commands.options import Device, Json, Quiet, RecipeName, Set, Verbose, make_console

if TYPE_CHECKING:
    from rich.table import Table


def plan(
    recipe: RecipeName,
    set_: Set = None,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what a recipe will cost: parameters, memory, operations, time.

    A step is gone through without numbers; where it fits, a few steps are
    then made on random weights. Exits 1 where it does not fit.
    """
    from spdcli.recipe.reading import load_recipe

    console = make_console(json, quiet, verbose)
    loaded = load_recipe(recipe, set_ or [], device=device)
    from spdcli.costs.estimate import estimate
    from spdcli.errors import SpdError
    from spdcli.runs.subject import choose_device

    with console.live() as live:
        live.update("a step is counted without numbers, then a few are made", 0, 1)
        found = estimate(loaded, choose_device(loaded.recipe.device))
    console.show({"schema": "spd.plan/1", **found}, table(found))
    if not found["fits"]:
        sizes = f"needs {amount(found['bytes']['total'])}, and {amount(found['free_bytes'])} are free"
        raise SpdError(f"{loaded.recipe.name} does not fit: it {sizes}", f"--set {', or '.join(found['change'])}")
    took = "no step could be timed: memory ended" if found["seconds"] is None else span(found["seconds"])
    console.result(f"fits: {amount(found['bytes']['total'])}, {took}")


def amount(size: float) -> str:
    """Bytes as people say them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def span(seconds: float) -> str:
    """A time as people say it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def table(found: dict[str, Any]) -> Table:
    """One row a number."""
    from rich.table import Table

    title = f"{found['recipe']}: {found['matrices']} matrices, {found['tokens']} tokens a step"
    made = Table(title=title, min_width=len(title))
    made.add_column("")
    made.add_column("", justify="right")
    for name, count in found["parameters"].items():
        made.add_row(f"parameters of {name}", f"{count:,}")
    made.add_section()
    for name, size in found["bytes"].items():
        made.add_row(f"memory: {name}", amount(size))
    made.add_row("memory that is free", amount(found["free_bytes"]))
    made.add_section()
    made.add_row("operations of a step", f"{found['flops_per_step'] / 1e9:,.1f} GFLOP")
    if found["seconds"] is not None:
        made.add_row("a step", f"{found['seconds_per_step']:.3g} s")
        training = f", after {found['toy_steps']} of the toy's" if found["toy_steps"] else ""
        made.add_row(f"all {found['steps']} steps{training}", span(found["seconds"]))
    return made
