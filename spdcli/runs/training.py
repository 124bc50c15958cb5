"""What `spd train` and `spd decompose` do: a toy trained, a decomposition learned, into a directory or in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spdcli.disk import write_atomically
from spdcli.engine.fit import FitState
from spdcli.errors import Interrupted, RecipeError
from spdcli.files import save_tensors
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.reading import LoadedRecipe
from spdcli.recipe.schema import Recipe, ResidMLPTarget, TMSTarget, ToyTarget
from spdcli.runs.directory import DECOMPOSITION, TOY, TOY_WEIGHTS, RunDirectory, ToyDirectory
from spdcli.runs.learning import Store, learned, stopped
from spdcli.runs.lock import locked
from spdcli.runs.memory import MemoryRun
from spdcli.runs.opening import refuse_without_beginning
from spdcli.runs.signals import stop_signals
from spdcli.runs.subject import (
    Subject,
    Toy,
    begin_toy,
    choose_device,
    load_toy,
    open_subject,
    toy_training,
)
from spdcli.targets.feature_toys import FeatureToy
from spdcli.targets.feature_training import label_error
from spdcli.targets.induction import toy_accuracy
from spdcli.targets.toy_state import toy_diverged

FRESH_SEQUENCES = 20_000  # what a toy's accuracy is measured on
SURE = 0.999  # share of them that a toy which has learned the task is right on
TOY_CHECKPOINT_EVERY = 1000  # steps of the toy's training


@dataclass(frozen=True, eq=False)
class TrainedToy:
    """A toy with the `records` of its training. Of the induction toy `accuracy` is the share of FRESH_SEQUENCES
    sequences whose answer it gives; of a feature toy `error` is its squared error on fresh inputs."""

    toy: Toy
    accuracy: float | None
    records: list[dict[str, Any]]
    error: float | None = None

    @property
    def quality(self) -> str:
        """How good it is, in words."""
        if self.accuracy is None:
            return f"squared error {self.error:.2e} on fresh inputs"
        return f"right on {self.accuracy:.2%} of fresh sequences"


def require_toy(loaded: LoadedRecipe) -> None:
    """RecipeError unless the recipe describes a toy and its training."""
    if not isinstance(loaded.recipe.target, ToyTarget):
        raise loaded.error(
            "target.kind", f"[target] kind = '{loaded.recipe.target.kind}' comes trained; only toys are trained"
        )
    if loaded.recipe.train is None:
        raise RecipeError([loaded.source.problem([("train",)], "[train] is missing; it says how the toy is trained")])


def train_toy_of(recipe: Recipe, store: Store, report: Report = silent) -> TrainedToy:
    """Train the toy of a recipe (section 5.1, Table 3) to the end, from its checkpoint where `store` has one.

    Weights and metrics go into `store`. Interrupted, with everything saved, when a signal asked to stop.
    """
    assert recipe.train is not None
    toy, state = begin_toy(recipe, choose_device(recipe.device))
    if isinstance(store, RunDirectory) and store.has_checkpoint:
        store.load_checkpoint(toy, state, report)
        report(Progress(f"the toy's training goes on from step {state.step}"))
    store.start_metrics(after=state.step)
    with stop_signals() as signals:
        for record in toy_training(recipe, toy, state):
            if record is not None:
                store.add_metrics(record)
                right = f"  accuracy {record['accuracy']:.1%}" if "accuracy" in record else ""
                text = f"training the toy  loss {record['loss']:.4g}{right}"
                numbers: dict[str, float] = {name: record[name] for name in ("loss", "accuracy") if name in record}
                report(Progress(text, state.step, recipe.train.steps, numbers=numbers, terms={"loss": record["loss"]}))
            else:
                report(Progress("", state.step, recipe.train.steps, step_only=True))
            if not signals and state.step % TOY_CHECKPOINT_EVERY == 0 and state.step < recipe.train.steps:
                with signals.held():
                    save_toy_checkpoint(store, toy, state)
            if signals:
                break
        with signals.held():
            save_toy_checkpoint(store, toy, state)
    if state.step < recipe.train.steps:
        raise stopped(store, f"step {state.step} of {recipe.train.steps} of the toy's training")
    if isinstance(store, RunDirectory):
        save_tensors(store / TOY_WEIGHTS, toy.state_dict())
    toy, fresh = toy.eval(), torch.Generator().manual_seed(recipe.seed + 1_000_003)
    if isinstance(toy, FeatureToy):
        assert isinstance(recipe.target, TMSTarget | ResidMLPTarget)
        error = label_error(toy, recipe.target.feature_probability, fresh)
        return TrainedToy(toy, None, store.metrics(), error)
    accuracy = toy_accuracy(toy, FRESH_SEQUENCES, fresh)
    if accuracy < SURE:
        doubt = f"the toy is right on only {accuracy:.2%} of fresh sequences; train it longer (train.steps)"
        report(Progress(doubt, warning=True))
    return TrainedToy(toy, accuracy, store.metrics())


def save_toy_checkpoint(store: Store, toy: Toy, state: FitState) -> None:
    """Save what the toy's training goes on from; SpdError where a loss since the last record spoilt it."""
    if not all(parameter.isfinite().all() for parameter in toy.parameters()):
        raise toy_diverged("a parameter is not finite", state.step)
    store.save_checkpoint(toy, state)


def prepared_subject(store: Store, loaded: LoadedRecipe, report: Report = silent) -> Subject:
    """The target of a run, its toy trained first, or copied in where the recipe names one."""
    recipe, device = loaded.recipe, choose_device(loaded.recipe.device)
    if not isinstance(recipe.target, ToyTarget):
        return open_subject(recipe, device, report=report)
    if isinstance(store, MemoryRun):
        toy = None if recipe.target.path is None else load_toy(toy_folder(loaded), recipe.target, device)
        return open_subject(recipe, device, toy=toy or train_toy_of(recipe, MemoryRun(), report).toy)
    weights = store / TOY / TOY_WEIGHTS
    if not weights.exists() and recipe.target.path is not None:
        folder = toy_folder(loaded)
        load_toy(folder, recipe.target, device)
        write_atomically(weights, lambda beside: shutil.copyfile(folder / TOY_WEIGHTS, beside))
    elif not weights.exists():
        toy_run = ToyDirectory(store / TOY)
        with locked(toy_run.path):
            if not toy_run.has_checkpoint:
                toy_run = ToyDirectory.create(toy_run.path, recipe, force=True)
            trained = train_toy_of(recipe, toy_run, report)
        report(Progress(f"toy trained into {toy_run.path}: {trained.quality}"))
    return open_subject(recipe, device, store / TOY)


def toy_folder(loaded: LoadedRecipe) -> Path:
    """Where the toy is that `target.path` names: a run of `spd train`, a run that holds one, or a package's folder."""
    assert isinstance(loaded.recipe.target, ToyTarget)
    assert loaded.recipe.target.path is not None
    from spdcli.targets.sources import PACKAGE, file_in_package

    path = loaded.recipe.target.path
    named = file_in_package(path) if path.startswith(PACKAGE) else Path(path)
    folder = named if (named / TOY_WEIGHTS).exists() else named / TOY
    if not (folder / TOY_WEIGHTS).exists():
        raise loaded.error("target.path", f"[target] path: {named} holds no toy", "spd train RECIPE makes one")
    return folder


def finish_run(
    run: RunDirectory, loaded: LoadedRecipe, subject: Callable[[], Subject], report: Report = silent
) -> None:
    """Trains the decomposition of a run to its end, unless that was done before."""
    try:
        with locked(run.path):
            _finish(run, loaded, subject, report)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(
            f"stopped; {run.path} is as it was last saved", "the same command goes on from there"
        ) from None


def _finish(run: RunDirectory, loaded: LoadedRecipe, subject: Callable[[], Subject], report: Report) -> None:
    records, saved = run.metrics(), (run / DECOMPOSITION).exists()
    if saved and records and records[-1]["step"] == loaded.recipe.decompose.steps:
        report(Progress(f"{run.path} is decomposed already"))
        return
    if saved:
        refuse_without_beginning(run)
    learned(run, loaded, subject(), report)
