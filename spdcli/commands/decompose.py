"""`spd decompose`: learn a decomposition from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spdcli.commands.options import (
    Device,
    Force,
    Json,
    Nproc,
    Out,
    Quiet,
    RecipeName,
    Resume,
    Seed,
    Set,
    Verbose,
    make_console,
)

Text = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Decompose on this text in place of the recipe's prompts: data.stream, with importance.basis=full.",
        show_default=False,
    ),
]


def decompose(
    recipe: RecipeName,
    out: Out = Path("run"),
    data: Text = None,
    set_: Set = None,
    device: Device = None,
    seed: Seed = None,
    force: Force = False,
    resume: Resume = False,
    nproc: Nproc = 1,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Take a target's weight matrices apart into slices, by a recipe (Algorithm 3).

    An induction toy that the recipe does not name by target.path is trained first, into OUT/toy.
    Ctrl-C stops cleanly; --resume goes on exactly there. Under torchrun, or
    with --nproc, several processes make the run together.
    """
    from spdcli.recipe.overrides import text_in_place_of_prompts
    from spdcli.recipe.reading import load_recipe

    console = make_console(json, quiet, verbose)
    on_text = text_in_place_of_prompts(data) if data else []
    loaded = load_recipe(recipe, [*on_text, *(set_ or [])], seed=seed, device=device)
    from spdcli import api
    from spdcli.runs.joining import SAID_BY_THE_FIRST, follows_another

    if follows_another():
        try:
            api.decompose(loaded, out, force=force, resume=resume)
        except SAID_BY_THE_FIRST as error:
            raise typer.Exit(error.exit_code) from None
        return
    with console.progress(f"preparing {loaded.recipe.name}") as progress:
        run = api.decompose(loaded, out, progress=progress, force=force, resume=resume, nproc=nproc)
    console.debug(str(run))
    last = run.home.last_record
    warnings = [warning for record in run.home.metrics() for warning in record.get("warnings", ())]
    active = sum(last["active"].values())
    console.show(
        {"schema": "spd.decompose/1", "run": out, **last, "warnings": warnings},
        f"total loss {last['total']:.3e} after {last['step']} steps, {active:.2f} active slices a position",
    )
    console.result(out)
