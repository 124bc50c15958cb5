"""`spd import` and `spd export`: decompositions from and for goodfire-ai/spd, the authors' public code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spdcli.commands.options import (
    Device,
    Force,
    Json,
    Out,
    Quiet,
    RecipeName,
    RunPath,
    Set,
    Verbose,
    make_console,
)
from spdcli.errors import UsageError

Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint: model_STEP.pth, or safetensors.", metavar="CHECKPOINT")]
Written = Annotated[Path, typer.Option("--out", "-o", help="The file to write: .pth, or .safetensors.")]


def import_checkpoint(
    checkpoint: Checkpoint,
    recipe: RecipeName,
    out: Out = Path("run"),
    set_: Set = None,
    device: Device = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a run of a checkpoint of goodfire-ai/spd, of a recipe's language model.

    Slices and importance functions (mlp, vector_mlp, shared_mlp with one hidden
    layer) are the checkpoint's, target and prompts the recipe's. A file of
    torch.save is read as tensors alone: nothing in it is executed.
    """
    from spdcli.recipe.reading import load_recipe

    console = make_console(json, quiet, verbose)
    loaded = load_recipe(recipe, set_ or [], device=device)
    from spdcli import api
    from spdcli.runs.directory import RECIPE

    if (out / RECIPE).exists() and not force:
        raise UsageError(f"{out} holds a run", "--force replaces it, or name another with --out")

    with console.progress() as progress:
        run = api.import_checkpoint(checkpoint, loaded, progress=progress)
    run.save(out, force=force)
    names = run.matrices
    slices = sum(run.decomposition.of(name).U.shape[1] for name in names)
    told = f"{len(names)} matrices, {slices} slices, importance functions of kind {run.recipe.importance.kind}"
    data = {"schema": "spd.import/1", "run": out, "checkpoint": checkpoint, "matrices": names, "slices": slices}
    console.show(data, told)
    console.result(out)


def export(
    run: RunPath,
    out: Written = Path("model.pth"),
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a run as a checkpoint of goodfire-ai/spd: a state dict of slices, importance functions and target."""
    console = make_console(json, quiet, verbose)
    from spdcli.runs.goodfire import KINDS, export_run
    from spdcli.runs.loading import load

    loaded = load(run, "cpu")
    console.debug(str(loaded))
    export_run(loaded, out, force)
    importance, C = loaded.recipe.importance, loaded.recipe.slices.C
    kind, width = KINDS[importance.kind], importance.gate_width
    settings = {"C": C, "ci_fn_type": kind, "ci_fn_hidden_dims": [width], "sigmoid_type": "leaky_hard"}
    told = "its configuration needs " + ", ".join(f"{name}: {value}" for name, value in settings.items())
    console.show({"schema": "spd.export/1", "run": run, "settings": settings, "saved": out}, told)
    console.result(out)
