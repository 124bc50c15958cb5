"""`spd decompose`: learn a decomposition from a recipe."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdcli.commands.options import Device, Force, Json, Out, Quiet, Resume, Seed, Set, Verbose, make_console
from spdcli.commands.train import RecipeName
from spdcli.errors import Interrupted, SpdError, UsageError

if TYPE_CHECKING:
    from spdcli.console import Console, LiveLine
    from spdcli.engine.fit import FitState, Record
    from spdcli.engine.subcomponents import Decomposition
    from spdcli.recipe.reading import LoadedRecipe
    from spdcli.recipe.schema import Recipe
    from spdcli.runs.directory import RunDirectory
    from spdcli.runs.subject import Subject


CHANGEABLE = ("losses", "decompose", "device", "name")  # what --resume may be given anew


def decompose(
    recipe: RecipeName,
    out: Out = Path("run"),
    set_: Set = None,
    device: Device = None,
    seed: Seed = None,
    force: Force = False,
    resume: Resume = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Take a target's weight matrices apart into slices, by a recipe (Algorithm 3).

    An induction toy that the recipe does not name by target.path is trained first, into OUT/toy.
    Ctrl-C stops cleanly; --resume goes on exactly there.
    """
    from spdcli.recipe.reading import load_recipe

    console = make_console(json, quiet, verbose)
    loaded = load_recipe(recipe, set_ or [], seed=seed, device=device)
    from spdcli.runs.directory import CHECKPOINT, TOY, TOY_WEIGHTS, RunDirectory

    if resume and force:
        raise UsageError("--resume and --force contradict each other", "give one of the two")
    if resume and ((out / CHECKPOINT).exists() or (out / TOY / TOY_WEIGHTS).exists()):
        run = continue_run(out, loaded.recipe, console)
    else:
        if resume:
            if (out / TOY_WEIGHTS).exists():
                raise UsageError(
                    f"{out} holds a trained toy and no decomposition",
                    f"--set target.path={out} --out another decomposes that toy",
                )
            console.note(f"{out}: no checkpoint to go on from; starting anew")
        run = RunDirectory.create(out, loaded.recipe, force or resume)
    try:
        subject = prepare_subject(run, loaded, console)
        last = learn(run, loaded, subject, console)
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C that would not wait
        raise Interrupted(
            f"stopped at once; {out} is as it was last saved", "the same command with --resume goes on from there"
        ) from None
    active = sum(last["active"].values())
    console.show(
        {"schema": "spd.decompose/1", "run": out, **last},
        f"total loss {last['total']:.3e} after {last['step']} steps, {active:.2f} active slices a position",
    )
    console.result(out)


def continue_run(path: Path, recipe: Recipe, console: Console) -> RunDirectory:
    """The run at `path`, going on by `recipe`: losses and training may have changed, what is trained may not."""
    from spdcli.runs.directory import RunDirectory

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
        console.note(f"{key} changes from {before!r} to {after!r}")
    run.write_recipe(recipe)
    return run


def changed_settings(run: RunDirectory, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Where `recipe` differs from that of `run`: dotted key -> (the run's value, the recipe's)."""
    from spdcli.runs.directory import anchored

    before, after = flat(run.recipe.model_dump()), flat(anchored(recipe).model_dump())
    keys = sorted(before | after)
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def prepare_subject(run: RunDirectory, loaded: LoadedRecipe, console: Console) -> Subject:
    """The target of a run, its toy trained first or copied in where it needs one."""
    import shutil

    from spdcli.commands.train import train_into
    from spdcli.files import write_atomically
    from spdcli.recipe.schema import InductionTarget
    from spdcli.runs.directory import TOY, TOY_WEIGHTS, RunDirectory
    from spdcli.runs.subject import choose_device, load_toy, open_subject

    recipe = loaded.recipe
    device = choose_device(recipe.device)
    if isinstance(recipe.target, InductionTarget) and not (run / TOY / TOY_WEIGHTS).exists():
        if recipe.target.path is not None:
            given = Path(recipe.target.path)
            source = given if (given / TOY_WEIGHTS).exists() else given / TOY
            if not (source / TOY_WEIGHTS).exists():
                raise loaded.error("target.path", f"[target] path: {given} holds no toy", "spd train RECIPE makes one")
            load_toy(source, recipe.target, device)
            write_atomically(run / TOY / TOY_WEIGHTS, lambda beside: shutil.copyfile(source / TOY_WEIGHTS, beside))
        else:
            toy_run = RunDirectory.create(run / TOY, recipe, force=True)
            accuracy = train_into(toy_run, recipe, console)
            console.note(f"toy trained into {toy_run.path}: right on {accuracy:.2%} of fresh sequences")
    return open_subject(recipe, device, run / TOY)


def learn(run: RunDirectory, loaded: LoadedRecipe, subject: Subject, console: Console) -> dict:
    """Train the decomposition of a run to its end, from its checkpoint where it has one; returns the last record."""
    from spdcli.engine.fit import fit, start_fit, warm_up_faithfulness
    from spdcli.machine import free_bytes, unborn_bytes
    from spdcli.recipe.reading import select_matrices
    from spdcli.runs.decomposition import start_decomposition
    from spdcli.runs.directory import CHECKPOINT
    from spdcli.runs.settings import allow_tensor_cores, fit_settings, optimiser_settings
    from spdcli.runs.subject import stream_batches

    recipe = loaded.recipe
    allow_tensor_cores(recipe.decompose.precision)
    names = select_matrices(loaded, list(subject.target.matrices))
    console.debug(f"{len(names)} matrices, {recipe.slices.C} slices each, on {subject.target.device}")
    refuse_too_large(recipe, subject, names)
    decomposition = start_decomposition(recipe, subject, names)
    state = start_fit(
        decomposition,
        optimiser_settings(recipe.decompose),
        recipe.seed,
        subject.target.device,
        recipe.decompose.slice_rate,
    )
    if (run / CHECKPOINT).exists():
        run.load_checkpoint(decomposition, state)
        console.note(f"going on from step {state.step}")
    elif recipe.slices.faithfulness_warmup:
        reached = warm_up_faithfulness(subject.target, decomposition, recipe.slices.faithfulness_warmup)
        console.note(f"faithfulness {reached:.1e} after {recipe.slices.faithfulness_warmup} steps of warm-up")
    run.start_metrics(after=state.step)
    free = free_bytes(subject.target.device) - unborn_bytes(decomposition)
    broad = stream_batches(recipe, subject)
    steps = fit(subject.target, decomposition, subject.batches, state, fit_settings(recipe, free), broad)
    with console.live() as live, stop_asked() as asked:
        for record in steps:
            if record is not None:
                run.add_metrics(asdict(record))
                show_progress(live, record, recipe.decompose.steps)
            if asked:
                break
            if state.step % recipe.decompose.checkpoint_every == 0 and state.step < recipe.decompose.steps:
                save(run, decomposition, state)
    save(run, decomposition, state)
    if state.step < recipe.decompose.steps:
        raise Interrupted(
            f"stopped after step {state.step} of {recipe.decompose.steps}; everything is saved in {run.path}",
            "the same command with --resume goes on there",
        )
    return run.metrics()[-1]


@contextmanager
def stop_asked() -> Iterator[list[int]]:
    """While open, Ctrl-C or a termination signal fills the list instead of interrupting a step; a second one does."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save(run: RunDirectory, decomposition: Decomposition, state: FitState) -> None:
    run.save_checkpoint(decomposition, state)
    run.save_decomposition(decomposition)


def show_progress(live: LiveLine, record: Record, steps: int) -> None:
    """The live line: total loss, its terms, and mean active slices a position by matrix group."""
    groups: dict[str, float] = {}
    for name, active in record.active.items():
        group = name.rsplit(".", 1)[-1] if "." in name else name
        groups[group] = groups.get(group, 0.0) + active
    terms = " ".join(f"{name} {value:.1e}" for name, value in record.losses.items())
    counts = " ".join(f"{group} {value:.2f}" for group, value in groups.items())
    live.update(f"loss {record.total:.2e} ({terms})  L0 {counts}", record.step, steps)


def refuse_too_large(recipe: Recipe, subject: Subject, names: list[str]) -> None:
    """SpdError before hours of swapping: when parameters, gradients and moments alone exceed the free memory."""
    from spdcli.machine import free_bytes, training_bytes
    from spdcli.runs.decomposition import parameter_counts

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
