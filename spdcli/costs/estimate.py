"""What a recipe will cost: parameters, memory, operations and seconds, before anything is trained."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from spdcli.costs.heap import Heap
from spdcli.costs.on_paper import Divided, OnPaper, divided
from spdcli.costs.random_targets import untrained_subject
from spdcli.costs.step_without_numbers import META, Dry, NoNoise
from spdcli.costs.timing import seconds_of_a_step, seconds_of_a_toy_step
from spdcli.engine.fit import FitSettings, portion_of
from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.part_tables import IMPORTANCE_FUNCTIONS
from spdcli.engine.portion import Portion, variants_of_a_step
from spdcli.engine.step import backward_step
from spdcli.engine.subcomponents import Decomposition
from spdcli.machine import STATES, Machine, describe, divides_moments, free_bytes, state_bytes, used_bytes
from spdcli.recipe.reading import LoadedRecipe, select_matrices
from spdcli.recipe.schema import Recipe, ToyTarget
from spdcli.records import ABSENT, Absent
from spdcli.runs.decomposition import refuse_too_few_slices, untrained_decomposition
from spdcli.runs.learning import divided_by_rows
from spdcli.runs.settings import fit_settings
from spdcli.runs.subject import Subject
from spdcli.runs.text_data import stream_batches


@dataclass(frozen=True)
class Need:
    """Bytes of a run.

    `process` is Python with its libraries; `weights` those of target, slices and gates; `optimizer` its moments and the
    gradients; `activations` what a step has at its peak, holes of the allocator included; `total` all of them.
    """

    process: int
    weights: int
    optimizer: int
    activations: int
    total: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.process + self.weights + self.optimizer + self.activations)


@dataclass(frozen=True)
class Parameters:
    """How many numbers are trained: in U and V of all slices, and in the importance functions."""

    slices: int
    gates: int


@dataclass(frozen=True)
class StepCosts:
    """What a step costs, counted without numbers: its tokens, the floating-point operations of its products, and the
    bytes that its operations read and write."""

    tokens: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Durations:
    """Seconds, measured: of a step of the decomposition, of one of the toy's own training, of all steps of both."""

    step: float
    toy_step: float
    total: float


@dataclass(frozen=True)
class Estimate:
    """What a recipe will cost, as `spd plan --json` shows it.

    `matrices` is how many are decomposed; `free_bytes` the memory that the run may take, and `fits` whether its
    `bytes` are no more; `change` names settings that would make it smaller where it does not. `toy_steps` are those by
    which the toy is trained first. The seconds are measured by making steps, and None where none was made: they were
    not wanted, the recipe does not fit, or memory ended in the attempt. Where several processes divide the work
    (`divided`), bytes and operations are of one of them, tokens and parameters of the whole.
    """

    recipe: str
    matrices: int
    parameters: Parameters
    bytes: Need
    free_bytes: int
    fits: bool
    change: list[str]
    tokens: int
    flops_per_step: int
    bytes_per_step: int
    steps: int
    seconds_per_step: float | None
    toy_steps: int
    seconds_per_toy_step: float | None
    seconds: float | None
    machine: Machine
    divided: Divided | Absent = ABSENT


def estimate(loaded: LoadedRecipe, device: torch.device, seconds: bool = True, processes: int = 1) -> Estimate:
    """What a recipe will cost on `device`; steps are timed only with `seconds`, which takes some.

    Of several `processes` it is what each costs, and no step is timed; it fits where all of them fit on a processor, or
    one on each GPU.
    """
    recipe = loaded.recipe
    counts = counted(loaded, device, processes, processes)
    fits = counts.fits
    times = _timed(recipe, counts, device) if seconds and fits and processes == 1 else None
    return Estimate(
        recipe=recipe.name,
        matrices=len(counts.names),
        parameters=counts.parameters,
        bytes=counts.need,
        free_bytes=counts.free,
        fits=fits,
        change=counts.change,
        tokens=counts.step.tokens,
        flops_per_step=counts.step.flops,
        bytes_per_step=counts.step.bytes,
        steps=recipe.decompose.steps,
        seconds_per_step=None if times is None else times.step,
        toy_steps=toy_steps(recipe),
        seconds_per_toy_step=None if times is None else times.toy_step,
        seconds=None if times is None else times.total,
        machine=describe(device),
        divided=counts.divided or ABSENT,
    )


def toy_steps(recipe: Recipe) -> int:
    """Steps by which the toy is trained before it is decomposed; 0 for a target that is there already."""
    target = recipe.target
    if not isinstance(target, ToyTarget) or target.path is not None:
        return 0
    assert recipe.train is not None
    return recipe.train.steps


@dataclass(frozen=True)
class Counts:
    """What is known without numbers: the names of the matrices, sizes, the settings of the training loop, which may use
    for a plan what memory is left, and those to `change` where it does not fit."""

    names: list[str]
    settings: FitSettings
    parameters: Parameters
    need: Need
    free: int
    step: StepCosts
    change: list[str]
    fits: bool
    divided: Divided | None = None


def counted(loaded: LoadedRecipe, device: torch.device, processes: int = 1, here: int = 1) -> Counts:
    """Builds the recipe's target and decomposition as shapes alone, goes through one step, and counts: what it costs
    each of so many `processes`, of which so many are `here` and share the memory of a processor."""
    recipe = loaded.recipe
    heap = Heap()
    try:
        with Dry(heap) as state:
            subject = untrained_subject(recipe, META)
            names = select_matrices(loaded, list(subject.target.matrices))
            refuse_too_few_slices(recipe, subject, names)
            decomposition = untrained_decomposition(recipe, subject, names, META)
            trained = [p for p in decomposition.parameters() if p.requires_grad]
            parts = processes if divides_moments(sum(p.numel() * p.element_size() for p in trained), processes) else 1
            moments = [p.new_empty(math.ceil(p.numel() / parts)) for p in trained for _ in range(STATES - 1)]
        held = state.alive
        process = used_bytes(device)
        free = free_bytes(device) + process  # this process goes, the other comes
        optimizer = state_bytes(decomposition, processes)
        settings = fit_settings(recipe, free - process - held - optimizer)
        step, divided = _dry_step(recipe, subject, decomposition, settings, heap, OnPaper(0, processes))
        growth = heap.growth
    finally:
        heap.close()
    parameters = sum(p.numel() for p in trained)
    gates = sum(p.numel() for p in decomposition.importances.parameters() if p.requires_grad)
    weights = held - sum(m.numel() for m in moments) * subject.target.precision.itemsize
    need = Need(process, weights, optimizer, max(0, growth - weights - optimizer))
    here = 1 if device.type == "cuda" else here
    change = changes(recipe, need, free // here, gates > parameters - gates)
    sizes, fits = Parameters(parameters - gates, gates), here * need.total <= free
    return Counts(names, settings, sizes, need, free, step, change, fits, divided)


def _timed(recipe: Recipe, counts: Counts, device: torch.device) -> Durations | None:
    """How long steps take on `device`; None where memory ends in the attempt."""
    with suppress(torch.OutOfMemoryError):
        own = seconds_of_a_step(recipe, counts.names, counts.settings, device)
        toy = seconds_of_a_toy_step(recipe, device) if toy_steps(recipe) else 0.0
        return Durations(own, toy, own * recipe.decompose.steps + toy * toy_steps(recipe))
    return None


def _dry_step(
    recipe: Recipe,
    subject: Subject,
    decomposition: Decomposition,
    settings: FitSettings,
    heap: Heap,
    processes: OnPaper,
) -> tuple[StepCosts, Divided | None]:
    """What one step of the loop costs this one of the `processes`, and how they divide it if there are several; with a
    fixed batch its clean pass is made once and not counted."""
    generator, losses = torch.Generator(), settings.losses
    patterns = losses.coefficients.get("attention", 0) > 0

    def passes(portion: Portion) -> Clean:
        return clean_pass(subject.target, portion.batch, decomposition.names, patterns, losses.compares_outputs)

    def backward(clean: Clean, losses: LossSettings, portion: Portion) -> None:
        annealed, budget = losses.annealed(0, 1), settings.plan_bytes
        backward_step(
            subject.target, decomposition, clean, losses, annealed, generator, NoNoise(), budget, portion=portion
        )

    with Dry(heap):
        batch, broad = subject.batches(generator, 0), stream_batches(recipe, subject)
        fixed = batch is subject.batches(generator, 1)
        portion = Portion(batch, processes, divided_by_rows(subject, decomposition, settings, processes))
        clean = passes(portion) if fixed else None
    with Dry(heap) as step:
        clean = clean or passes(portion)
        backward(clean, losses, portion)
        if broad is not None:
            beside = portion_of(broad(generator, 0), processes)
            backward(passes(beside), losses.on_stream(settings.targeted), beside)
        processes.add_gradients(p for p in decomposition.parameters() if p.requires_grad)
    decomposition.zero_grad(set_to_none=True)
    costs = StepCosts(tokens=int(batch.valid.sum()), flops=step.flops, bytes=step.bytes)
    return costs, divided(portion, variants_of_a_step(losses, len(decomposition.names)), processes)


def amount(size: float) -> str:
    """Bytes as people say them."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def changes(recipe: Recipe, needed: Need, free: int, gates_largest: bool) -> list[str]:
    """Settings that make a recipe smaller, the most promising first; none where it fits."""
    if needed.total <= free:
        return []
    settings = []
    if needed.activations > needed.weights + needed.optimizer:
        settings += ["decompose.plan_memory=auto", "a smaller decompose.batch"]
    prompts = recipe.data is not None and recipe.data.prompts is not None
    spannable = IMPORTANCE_FUNCTIONS[recipe.importance.kind].spans and prompts
    if gates_largest and spannable and recipe.importance.basis != "span":
        settings.append("importance.basis=span")
    if gates_largest:
        settings.append("a smaller importance.gate_width")
    return [*settings, "a smaller slices.C", "fewer slices.matrices"]
