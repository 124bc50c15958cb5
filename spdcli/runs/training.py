"""What `spd train` and `spd decompose` do: a toy trained, a decomposition learned, into a directory or in memory."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spdcli.disk import write_atomically
from spdcli.engine.fit import Record, fit, start_fit, warm_up_faithfulness
from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import Interrupted, RecipeError, SpdError, UsageError
from spdcli.files import save_tensors
from spdcli.machine import free_bytes, state_bytes, training_bytes
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.reading import LoadedRecipe, select_matrices
from spdcli.recipe.schema import Recipe, ResidMLPTarget, TMSTarget, ToyTarget
from spdcli.runs.decomposition import parameter_counts, start_decomposition
from spdcli.runs.directory import DECOMPOSITION, RECIPE, TOY, TOY_WEIGHTS, RunDirectory, anchored
from spdcli.runs.memory import MemoryRun
from spdcli.runs.settings import allow_tensor_cores, fit_settings, optimiser_settings
from spdcli.runs.subject import Subject, Toy, choose_device, load_toy, open_subject, stream_batches, toy_training
from spdcli.targets.feature_toys import FeatureToy
from spdcli.targets.feature_training import label_error
from spdcli.targets.induction import toy_accuracy

FRESH_SEQUENCES = 20_000  # what a toy's accuracy is measured on
SURE = 0.999  # share of them that a toy which has learned the task is right on
# What a run that goes on may be given anew.
CHANGEABLE = ("losses", "adversary", "decompose", "device", "name", "certify")
Store = RunDirectory | MemoryRun


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
    """Train the toy of a recipe (section 5.1, Table 3); its weights and metrics go into `store`."""
    assert recipe.train is not None
    toy, device = None, choose_device(recipe.device)
    store.start_metrics()
    for toy, record in toy_training(recipe, device):  # noqa: B007
        store.add_metrics(record)
        right = f"  accuracy {record['accuracy']:.1%}" if "accuracy" in record else ""
        text = f"training the toy  loss {record['loss']:.4g}{right}"
        report(Progress(text, int(record["step"]), recipe.train.steps))
    assert toy is not None
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


def new_run(path: Path, recipe: Recipe, force: bool = False, resume: bool = False, report: Report = silent) -> Store:
    """The run directory at `path` for a decomposition by `recipe`: a new one, or with `resume` the one that is there.

    `force` replaces another run. UsageError where either is not possible.
    """
    if resume and force:
        raise UsageError("--resume and --force contradict each other", "give one of the two")
    directory = RunDirectory(path)
    if resume and (directory.has_checkpoint or (path / TOY / TOY_WEIGHTS).exists()):
        return continued_run(path, recipe, report)
    if resume:
        if (path / TOY_WEIGHTS).exists():
            raise UsageError(
                f"{path} holds a trained toy and no decomposition",
                f"--set target.path={path} --out another decomposes that toy",
            )
        report(Progress(f"{path}: no checkpoint to go on from; starting anew"))
    return RunDirectory.create(path, recipe, force or resume)


def continued_run(path: Path, recipe: Recipe, report: Report) -> RunDirectory:
    """The run at `path`, going on by `recipe`: losses and training may have changed, what is trained may not."""
    run = RunDirectory.open(path)
    changed = changed_settings(run, recipe)
    fixed = [key for key in changed if key.split(".")[0] not in CHANGEABLE]
    if fixed:
        before, after = changed[fixed[0]]
        raise UsageError(
            f"{path} was made with {fixed[0]} = {before!r}, not {after!r}",
            f"spd decompose {path}/recipe.toml --out {path} --resume goes on with its own settings",
        )
    for key, (before, after) in changed.items():
        report(Progress(f"{key} changes from {before!r} to {after!r}"))
    run.write_recipe(recipe)
    return run


def changed_settings(run: RunDirectory, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Where `recipe` differs from that of `run`: dotted key -> (the run's value, the recipe's)."""
    before, after = flat(run.recipe.model_dump()), flat(anchored(recipe).model_dump())
    keys = sorted(before | after)
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def prepared_subject(store: Store, loaded: LoadedRecipe, report: Report = silent) -> Subject:
    """The target of a run, its toy trained first, or copied in where the recipe names one."""
    recipe, device = loaded.recipe, choose_device(loaded.recipe.device)
    if not isinstance(recipe.target, ToyTarget):
        return open_subject(recipe, device)
    if isinstance(store, MemoryRun):
        toy = None if recipe.target.path is None else load_toy(toy_folder(loaded), recipe.target, device)
        return open_subject(recipe, device, toy=toy or train_toy_of(recipe, MemoryRun(), report).toy)
    weights = store / TOY / TOY_WEIGHTS
    if not weights.exists() and recipe.target.path is not None:
        folder = toy_folder(loaded)
        load_toy(folder, recipe.target, device)
        write_atomically(weights, lambda beside: shutil.copyfile(folder / TOY_WEIGHTS, beside))
    elif not weights.exists():
        toy_run = RunDirectory.create(store / TOY, recipe, force=True)
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


def learned(store: Store, loaded: LoadedRecipe, subject: Subject, report: Report = silent) -> Decomposition:
    """Train the decomposition of a run to its end (Algorithm 3), from its checkpoint where it has one.

    Every record goes into the store's metrics. Interrupted, with everything saved, when a signal asked to stop.
    """
    recipe = loaded.recipe
    allow_tensor_cores(recipe.decompose.precision)
    names = select_matrices(loaded, list(subject.target.matrices))
    refuse_too_large(recipe, subject, names)
    decomposition = start_decomposition(recipe, subject, names)
    schedule, device = optimiser_settings(recipe.decompose), subject.target.device
    state = start_fit(decomposition, schedule, recipe.seed, device, recipe.decompose.slice_rate)
    if isinstance(store, RunDirectory) and store.has_checkpoint:
        store.load_checkpoint(decomposition, state)
        report(Progress(f"going on from step {state.step}"))
    elif warm_up := recipe.slices.faithfulness_warmup:
        reached = warm_up_faithfulness(subject.target, decomposition, warm_up)
        report(Progress(f"faithfulness {reached:.1e} after {warm_up} steps of warm-up"))
    store.start_metrics(after=state.step)
    settings = fit_settings(recipe, free_bytes(device) - state_bytes(decomposition))
    steps = fit(subject.target, decomposition, subject.batches, state, settings, stream_batches(recipe, subject))
    with stop_signals() as signals:
        for record in steps:
            if record is not None:
                store.add_metrics(asdict(record))
                report(Progress(standing(record), record.step, recipe.decompose.steps))
            if signals:
                break
            if state.step % recipe.decompose.checkpoint_every == 0 and state.step < recipe.decompose.steps:
                store.save(decomposition, state)
    store.save(decomposition, state)
    if state.step < recipe.decompose.steps:
        where = f"stopped after step {state.step} of {recipe.decompose.steps}"
        if isinstance(store, MemoryRun):
            raise Interrupted(
                f"{where}; nothing is kept of a run in memory", "give it a directory, out=, to go on there"
            )
        raise Interrupted(f"{where}; everything is saved in {store}", "the same command with --resume goes on there")
    return decomposition.requires_grad_(False).eval()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """While open, Ctrl-C or a termination signal fills the list instead of interrupting a step; a second one does.

    Only the main thread of a program can listen: elsewhere the list stays empty.
    """
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def note(number: int, frame: object) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def standing(record: Record) -> str:
    """How a run stands: total loss, its terms, and mean active slices a position by matrix group."""
    groups: dict[str, float] = {}
    for name, active in record.active.items():
        group = name.rsplit(".", 1)[-1] if "." in name else name
        groups[group] = groups.get(group, 0.0) + active
    terms = " ".join(f"{name} {value:.1e}" for name, value in record.losses.items())
    counts = " ".join(f"{group} {value:.2f}" for group, value in groups.items())
    return f"loss {record.total:.2e} ({terms})  L0 {counts}"


def refuse_too_large(recipe: Recipe, subject: Subject, names: list[str]) -> None:
    """SpdError before hours of swapping: when parameters, gradients and moments alone exceed the free memory."""
    slices, gates = parameter_counts(recipe, subject, names)
    element = subject.target.unembedding.element_size()
    needed = training_bytes(slices + gates, element)
    free = free_bytes(subject.target.device)
    if needed <= free:
        return
    cheaper = "--set importance.basis=span, or " if gates > slices and recipe.importance.kind == "vector" else ""
    raise SpdError(
        f"{slices / 1e6:.0f} million slice and {gates / 1e6:.0f} million gate parameters need {needed / 2**30:.0f} GiB "
        f"to train; {free / 2**30:.0f} GiB are free",
        f"{cheaper}a smaller slices.C or importance.gate_width, or fewer slices.matrices",
    )


def claimed_run(path: Path, loaded: LoadedRecipe, force: bool) -> RunDirectory:
    """The run at `path`, there already by the same recipe, or new; UsageError when it is by another one."""
    if force or not (path / RECIPE).exists():
        return RunDirectory.create(path, loaded.recipe, force)
    run = RunDirectory.open(path)
    for key, (before, after) in changed_settings(run, loaded.recipe).items():
        if key.split(".")[0] in ("device", "certify"):  # neither changes what the run is
            continue
        raise UsageError(
            f"{path} was made with {key} = {before!r}, not {after!r}",
            "--force replaces it, --out names another directory",
        )
    return run


def finish_run(
    run: RunDirectory, loaded: LoadedRecipe, subject: Callable[[], Subject], report: Report = silent
) -> None:
    """Trains the decomposition of a run to its end, unless that was done before."""
    try:
        records = run.metrics()
        if (run / DECOMPOSITION).exists() and records and records[-1]["step"] == loaded.recipe.decompose.steps:
            report(Progress(f"{run.path} is decomposed already"))
        else:
            learned(run, loaded, subject(), report)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(
            f"stopped; {run.path} is as it was last saved", "the same command goes on from there"
        ) from None
