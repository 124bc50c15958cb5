"""`spd train`: train the induction toy of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spdcli.commands.options import Device, Force, Json, Out, Quiet, Seed, Set, Verbose, make_console
from spdcli.errors import Interrupted, RecipeError

if TYPE_CHECKING:
    from spdcli.console import Console
    from spdcli.recipe.reading import LoadedRecipe
    from spdcli.recipe.schema import Recipe
    from spdcli.runs.directory import RunDirectory

RecipeName = Annotated[str, typer.Argument(help="A recipe file, or a shipped recipe's name.", metavar="RECIPE")]
FRESH_SEQUENCES = 20_000  # what the accuracy is measured on


def train(
    recipe: RecipeName,
    out: Out = Path("toy"),
    set_: Set = None,
    device: Device = None,
    seed: Seed = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train the induction toy of a recipe (section 5.1, Table 3) into a run directory.

    Writes the toy's weights, a record a logged step, and the loss curve (Figure 5).
    """
    from spdcli.recipe.reading import load_recipe

    console = make_console(json, quiet, verbose)
    loaded = load_recipe(recipe, set_ or [], seed=seed, device=device)
    require_toy(loaded)
    from spdcli.runs.directory import RunDirectory

    run = RunDirectory.create(out, loaded.recipe, force)
    try:
        accuracy = train_into(run, loaded.recipe, console)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {out} has the metrics so far and no toy", "--force starts it anew") from None
    last = run.metrics()[-1]
    console.show(
        {"schema": "spd.train/1", "run": out, "loss": last["loss"], "accuracy": accuracy, "steps": last["step"]},
        f"loss {last['loss']:.2e} after {last['step']} steps, "
        f"right on {accuracy:.2%} of {FRESH_SEQUENCES} fresh sequences",
    )
    console.result(out)


def require_toy(loaded: LoadedRecipe) -> None:
    """RecipeError unless the recipe describes a toy and its training."""
    if loaded.recipe.target.kind != "induction":
        raise loaded.error(
            "target.kind", "[target] kind = 'huggingface' comes trained; only the induction toy is trained"
        )
    if loaded.recipe.train is None:
        raise RecipeError([loaded.source.problem([("train",)], "[train] is missing; it says how the toy is trained")])


def train_into(run: RunDirectory, recipe: Recipe, console: Console) -> float:
    """Train a toy, leaving weights, metrics and loss curve in `run`; returns its accuracy on fresh sequences."""
    import torch

    from spdcli.figures.curves import save_training_curve
    from spdcli.files import save_tensors
    from spdcli.runs.directory import FIGURES, TOY_WEIGHTS
    from spdcli.runs.subject import choose_device, toy_training
    from spdcli.targets.induction import toy_accuracy

    assert recipe.train is not None
    trained, device = None, choose_device(recipe.device)
    console.debug(f"training the toy into {run.path}, on {device}")
    run.start_metrics()
    with console.live() as live:
        for trained, record in toy_training(recipe, device):  # noqa: B007
            run.add_metrics(record)
            text = f"training the toy  loss {record['loss']:.4f}  accuracy {record['accuracy']:.1%}"
            live.update(text, int(record["step"]), recipe.train.steps)
    assert trained is not None
    save_tensors(run / TOY_WEIGHTS, trained.state_dict())
    save_training_curve(run.metrics(), run / FIGURES)
    accuracy = toy_accuracy(trained, FRESH_SEQUENCES, torch.Generator().manual_seed(recipe.seed + 1_000_003))
    if accuracy < 0.999:
        console.warn(f"the toy is right on only {accuracy:.2%} of fresh sequences; train it longer (train.steps)")
    return accuracy
