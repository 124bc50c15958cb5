"""A decomposition learned from the first step to the last, into a directory or in memory (Algorithm 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

import torch

from spdcli.engine.fit import FitSettings, FitState, Record, fit, start_fit, warm_up_faithfulness
from spdcli.engine.portion import variants_of_a_step
from spdcli.engine.processes import ALONE, Processes
from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import Collapsed, Interrupted, NotFinite, SpdError, UsageError
from spdcli.machine import divides_moments, free_bytes, state_bytes, training_bytes, used_bytes
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.reading import LoadedRecipe, select_matrices
from spdcli.recipe.schema import Recipe
from spdcli.recipe.training import Decompose
from spdcli.runs.decomposition import parameter_counts, start_decomposition
from spdcli.runs.directory import RunDirectory
from spdcli.runs.fingerprint import keep_fingerprint
from spdcli.runs.following import FollowedRun
from spdcli.runs.guard import Guard, start_guard
from spdcli.runs.memory import MemoryRun
from spdcli.runs.settings import allow_tensor_cores, fit_settings, optimiser_settings
from spdcli.runs.signals import stop_signals
from spdcli.runs.subject import Subject
from spdcli.runs.tensorboard import event_log
from spdcli.runs.text_data import stream_batches

Store = RunDirectory | MemoryRun
AnyStore = Store | FollowedRun  # of any of the processes that make a run


def stopped(store: AnyStore, where: str) -> Interrupted:
    """What a signal that asked to stop ends in, when all is saved; `where` says how far it came."""
    if isinstance(store, MemoryRun):
        return Interrupted(
            f"stopped after {where}; nothing is kept of a run in memory", "give it a directory, out=, to go on there"
        )
    run = store.run if isinstance(store, FollowedRun) else store
    return Interrupted(f"stopped after {where}; everything is saved in {run}", f"{run.command} --resume goes on there")


def learned(
    store: AnyStore, loaded: LoadedRecipe, subject: Subject, report: Report = silent, processes: Processes = ALONE
) -> Decomposition:
    """Train the decomposition of a run to its end (Algorithm 3), from its checkpoint where it has one.

    Every record goes into the store's metrics. Interrupted, with everything saved, when a signal asked to stop;
    NotFinite, with the step before saved, when a loss is not finite. Where that happens in the first step after a
    checkpoint, training goes on from the checkpoint before it. Where several `processes` make the run, all of them call
    this, and only the first has a `store` that it writes.
    """
    recipe = loaded.recipe
    allow_tensor_cores(recipe.decompose.precision)
    names = select_matrices(loaded, list(subject.target.matrices))
    refuse_too_large(recipe, subject, names, processes.count)
    if isinstance(store, RunDirectory):
        keep_fingerprint(store.path, subject.target)
    decomposition, state = begun_decomposition(recipe, subject, names, processes)
    resumed = store.has_checkpoint
    if resumed:
        store.load_checkpoint(decomposition, state, report)
        report(Progress(f"going on from step {state.step}"))
    else:
        warm_up(recipe, subject, decomposition, report)
    processes.follow(decomposition.state_dict().values())
    settings = fit_settings(recipe, free_bytes(subject.target.device) - state_bytes(decomposition, processes.count))
    settings = replace(settings, plan_bytes=processes.least(settings.plan_bytes))  # by which random numbers are ordered
    by_rows = divided_by_rows(subject, decomposition, settings, processes)
    stream, begun = stream_batches(recipe, subject), state.step
    guard = start_guard(recipe, subject, decomposition, settings, report)
    guard.replay([record for record in store.metrics() if record["step"] <= begun])
    while True:
        steps = fit(subject.target, decomposition, subject.batches, state, settings, stream, processes, by_rows)
        try:
            make_steps(store, steps, decomposition, state, recipe.decompose, report, guard, processes)
            break
        except (Collapsed, NotFinite) as error:
            if guard.may_rewind(error.step):
                decomposition, state = gone_back(store, recipe, subject, decomposition, state, processes)
                processes.follow(decomposition.state_dict().values())
                guard.rewind(error, state.step)
            elif isinstance(error, NotFinite) and resumed and error.step == begun + 1 and store.step_back():
                store.load_checkpoint(decomposition, state)
                report(Progress(f"{error}: going on from step {state.step}, the checkpoint before", warning=True))
            else:
                if isinstance(error, NotFinite):
                    store.keep_step(decomposition, state, error.step - 1)
                raise
            begun = state.step
    if state.step < recipe.decompose.steps:
        raise stopped(store, f"step {state.step} of {recipe.decompose.steps}")
    return decomposition.requires_grad_(False).eval()


def divided_by_rows(
    subject: Subject, decomposition: Decomposition, settings: FitSettings, processes: Processes
) -> bool:
    """Whether `processes` divide the rows of a step's plan and not its sequences: where all steps are on the same
    batch, or it has fewer sequences than there are processes. UsageError where there are fewer rows too."""
    if processes.count == 1:
        return False
    draw = torch.Generator()
    batch = subject.batches(draw, 0)
    sequences = len(batch.tokens)
    if batch is not subject.batches(draw, 1) and sequences >= processes.count:
        return False
    variants = variants_of_a_step(settings.losses, len(decomposition.names))
    rows = variants * sequences
    if processes.count > rows:
        raise UsageError(
            f"{processes.count} processes, and a step has {rows} rows to divide: {variants} variants of the model on "
            f"{sequences} sequences",
            f"--nproc {rows} at most" if rows > 1 else "leave --nproc out",
        )
    return True


def begun_decomposition(
    recipe: Recipe, subject: Subject, names: list[str], processes: Processes = ALONE
) -> tuple[Decomposition, FitState]:
    """The decomposition of the matrices `names` at step 0, and the state of its training, whose moments `processes`
    divide where they are large."""
    decomposition = start_decomposition(recipe, subject, names)
    schedule, device = optimiser_settings(recipe.decompose), subject.target.device
    trained = sum(p.numel() * p.element_size() for p in decomposition.parameters() if p.requires_grad)
    dividing = processes if divides_moments(trained, processes.count) else None
    rate = recipe.decompose.slice_rate
    return decomposition, start_fit(decomposition, schedule, recipe.seed, device, rate, dividing)


def gone_back(
    store: AnyStore,
    recipe: Recipe,
    subject: Subject,
    decomposition: Decomposition,
    state: FitState,
    processes: Processes = ALONE,
) -> tuple[Decomposition, FitState]:
    """The decomposition and the state of its training as they were last saved, or at the beginning, with half the
    learning rate that led away from there."""
    share = state.rate_share / 2
    if store.has_checkpoint:
        store.load_checkpoint(decomposition, state)
    else:
        decomposition, state = begun_decomposition(recipe, subject, decomposition.names, processes)
        warm_up(recipe, subject, decomposition)
    state.rate_share = share
    return decomposition, state


def warm_up(recipe: Recipe, subject: Subject, decomposition: Decomposition, report: Report = silent) -> None:
    """The steps on faithfulness alone that a recipe may want before the run."""
    steps = recipe.slices.faithfulness_warmup
    if steps:
        reached = warm_up_faithfulness(subject.target, decomposition, steps)
        report(Progress(f"faithfulness {reached:.1e} after {steps} steps of warm-up"))


def make_steps(
    store: AnyStore,
    steps: Iterator[Record | None],
    decomposition: Decomposition,
    state: FitState,
    section: Decompose,
    report: Report,
    guard: Guard,
    processes: Processes = ALONE,
) -> None:
    """Make `steps` until they end or a signal asks to stop; all is saved then, and every `checkpoint_every` steps.

    Collapsed where `guard` says that the run comes to nothing; with everything saved, unless it is to be gone back.
    All `processes` stop after the same step.
    """
    begun, collapse = state.step, None
    with stop_signals() as signals, event_log(store, section.tensorboard, begun) as log:
        for record in steps:
            if state.step == begun + 1:
                store.start_metrics(after=begun)
            if record is not None:
                warnings = [asdict(alarm) for alarm in guard.see(record)]
                store.add_metrics(asdict(record) | ({"warnings": warnings} if warnings else {}))
                log(record)
                report(standing(record, section.steps, state.generators["noise"].device))
                collapse = guard.collapse
            else:
                report(Progress("", state.step, section.steps, step_only=True))
            due = state.step % section.checkpoint_every == 0 and state.step < section.steps
            asked = processes.any(bool(signals))
            if due and not asked and collapse is None and guard.may_save:
                with signals.held():
                    store.save(decomposition, state)
                asked = processes.any(bool(signals))  # meanwhile
            if asked or collapse is not None:
                break
        if collapse is None or section.on_collapse == "stop":
            with signals.held():
                store.save(decomposition, state)
    if collapse is not None:
        raise collapse


def standing(record: Record, steps: int, device: torch.device) -> Progress:
    """How a run of so many `steps` stands: the total loss, reconstruction, active slices a position and the memory that
    is used; the terms of the loss; active slices by kind of matrix."""
    groups: dict[str, float] = {}
    for name, active in record.active.items():
        group = name.rsplit(".", 1)[-1] if "." in name else name
        groups[group] = groups.get(group, 0.0) + active
    recon = next(({"recon": value} for name, value in record.losses.items() if "recon" in name), {})
    numbers = {"loss": record.total, **recon, "active": sum(groups.values()), "GiB": used_bytes(device) / 2**30}
    terms = " ".join(f"{name} {value:.1e}" for name, value in record.losses.items())
    counts = " ".join(f"{group} {value:.2f}" for group, value in groups.items())
    text = f"loss {record.total:.2e}  active {numbers['active']:.2f} ({counts})  {terms}"
    return Progress(text, record.step, steps, numbers=numbers, terms=record.losses, groups=groups)


def refuse_too_large(recipe: Recipe, subject: Subject, names: list[str], processes: int = 1) -> None:
    """SpdError before hours of swapping: when parameters, gradients and moments alone exceed the free memory, in each
    of so many `processes`."""
    slices, gates = parameter_counts(recipe, subject, names)
    element = subject.target.precision.itemsize
    needed = training_bytes(slices + gates, element, processes)
    free = free_bytes(subject.target.device)
    if needed <= free:
        return
    cheaper = "--set importance.basis=span, or " if gates > slices and recipe.importance.kind == "vector" else ""
    raise SpdError(
        f"{slices / 1e6:.0f} million slice and {gates / 1e6:.0f} million gate parameters need {needed / 2**30:.0f} GiB "
        f"to train; {free / 2**30:.0f} GiB are free",
        f"{cheaper}a smaller slices.C or importance.gate_width, or fewer slices.matrices",
    )
