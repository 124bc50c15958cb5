"""`spd train`: train the induction toy of a recipe."""

from __future__ import annotations

from pathlib import Path

from spdcli.commands.options import (
    Device,
    Force,
    Json,
    Out,
    Quiet,
    RecipeName,
    Resume,
    Seed,
    Set,
    Verbose,
    make_console,
)


def train(
    recipe: RecipeName,
    out: Out = Path("toy"),
    set_: Set = None,
    device: Device = None,
    seed: Seed = None,
    force: Force = False,
    resume: Resume = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train the toy of a recipe (section 5.1, Table 3) into a run directory.

    Writes the toy's weights, a record a logged step, and the loss curve (Figure 5).
    Ctrl-C stops cleanly; --resume goes on exactly there, and further with a larger train.steps.
    """
    from spdcli.recipe.reading import load_recipe

    console = make_console(json, quiet, verbose)
    loaded = load_recipe(recipe, set_ or [], seed=seed, device=device)
    from spdcli.api import train_toy

    with console.progress(f"preparing {loaded.recipe.name}") as progress:
        trained = train_toy(loaded, out, progress=progress, force=force, resume=resume)
    last = trained.records[-1]
    console.show(
        {
            "schema": "spd.train/1",
            "run": out,
            "loss": last["loss"],
            "accuracy": trained.accuracy,
            "error": trained.error,
            "steps": last["step"],
        },
        f"loss {last['loss']:.2e} after {last['step']} steps, {trained.quality}",
    )
    console.result(out)
