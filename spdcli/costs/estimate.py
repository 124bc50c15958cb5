"""What a recipe will cost: parameters, memory, operations and seconds, before anything is trained."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from spdcli.costs.dry import META, Dry, NoNoise
from spdcli.costs.heap import Heap
from spdcli.costs.random_targets import untrained_subject
from spdcli.costs.timing import seconds_of_a_step, seconds_of_a_toy_step
from spdcli.engine.fit import FitSettings
from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.step import LossSettings, backward_step
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Batch
from spdcli.machine import STATES, describe, free_bytes, unborn_bytes, used_bytes
from spdcli.recipe.reading import LoadedRecipe, select_matrices
from spdcli.recipe.schema import InductionTarget, Recipe
from spdcli.runs.decomposition import untrained_decomposition
from spdcli.runs.settings import fit_settings
from spdcli.runs.subject import Subject, stream_batches


@dataclass(frozen=True)
class Need:
    """Bytes of a run. `process` is Python with its libraries; `activations` what a step has at its peak, holes of the
    allocator included; a step's gradients count as the optimizer's."""

    process: int
    weights: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.process + self.weights + self.optimizer + self.activations


def estimate(loaded: LoadedRecipe, device: torch.device, seconds: bool = True) -> dict[str, Any]:
    """What `spd plan --json` shows. Its seconds are measured by making steps, and None where `seconds` is False, the
    recipe does not fit, or memory ends in the attempt."""
    recipe = loaded.recipe
    found, names, settings = _counted(loaded, device)
    found |= {
        "steps": recipe.decompose.steps,
        "seconds_per_step": None,
        "toy_steps": toy_steps(recipe),
        "seconds_per_toy_step": None,
        "seconds": None,
        "machine": describe(device),
    }
    if seconds and found["fits"]:
        with suppress(torch.OutOfMemoryError):
            own = seconds_of_a_step(recipe, names, settings, device)
            toy = seconds_of_a_toy_step(recipe, device) if found["toy_steps"] else 0.0
            found |= {"seconds_per_step": own, "seconds_per_toy_step": toy}
            found["seconds"] = own * found["steps"] + toy * found["toy_steps"]
    return found


def toy_steps(recipe: Recipe) -> int:
    """Steps by which the toy is trained before it is decomposed; 0 for a target that is there already."""
    target = recipe.target
    if not isinstance(target, InductionTarget) or target.path is not None:
        return 0
    assert recipe.train is not None
    return recipe.train.steps


def _counted(loaded: LoadedRecipe, device: torch.device) -> tuple[dict[str, Any], list[str], FitSettings]:
    """What can be told without numbers; the names of the matrices; the loop's settings, with the memory that is left
    for a plan."""
    recipe = loaded.recipe
    heap = Heap()
    try:
        with Dry(heap) as state:
            subject = untrained_subject(recipe, META)
            names = select_matrices(loaded, list(subject.target.matrices))
            decomposition = untrained_decomposition(recipe, subject, names, META)
            trained = [p for p in decomposition.parameters() if p.requires_grad]
            moments = [torch.empty_like(p) for p in trained for _ in range(STATES - 1)]
        held = state.alive
        process = used_bytes(device)
        free = free_bytes(device) + process  # this process goes, the other comes
        settings = fit_settings(recipe, free - process - held - unborn_bytes(decomposition))
        step = _dry_step(recipe, subject, decomposition, settings, heap)
        grown = heap.grown
    finally:
        heap.close()
    element = subject.target.unembedding.element_size()
    parameters = sum(p.numel() for p in trained)
    gates = sum(p.numel() for p in decomposition.importances.parameters() if p.requires_grad)
    optimizer = unborn_bytes(decomposition)
    weights = held - sum(m.numel() for m in moments) * element
    needed = Need(process, weights, optimizer, max(0, grown - weights - optimizer))
    found = {
        "recipe": recipe.name,
        "matrices": len(names),
        "parameters": {"slices": parameters - gates, "gates": gates},
        "bytes": {**asdict(needed), "total": needed.total},
        "free_bytes": free,
        "fits": needed.total <= free,
        "change": changes(recipe, needed, free, gates > parameters - gates),
        **step,
    }
    return found, names, settings


def _dry_step(
    recipe: Recipe, subject: Subject, decomposition: Decomposition, settings: FitSettings, heap: Heap
) -> dict[str, int]:
    """One step of the loop without numbers; with a fixed batch its clean pass is made once and not counted."""
    generator, losses = torch.Generator(), settings.losses
    patterns = losses.coefficients.get("attention", 0) > 0

    def passes(batch: Batch) -> Clean:
        return clean_pass(subject.target, batch, decomposition.names, patterns)

    def backward(clean: Clean, losses: LossSettings) -> None:
        backward_step(
            subject.target, decomposition, clean, losses, losses.p_start, generator, NoNoise(), settings.plan_bytes
        )

    with Dry(heap):
        batch, broad = subject.batches(generator), stream_batches(recipe, subject)
        fixed = batch is subject.batches(generator)
        clean = passes(batch) if fixed else None
    with Dry(heap) as step:
        clean = clean or passes(batch)
        backward(clean, losses)
        if broad is not None:
            backward(passes(broad(generator)), losses.on_stream(settings.targeted))
    decomposition.zero_grad(set_to_none=True)
    return {"tokens": int(batch.valid.sum()), "flops_per_step": step.flops, "bytes_per_step": step.bytes}


def changes(recipe: Recipe, needed: Need, free: int, gates_largest: bool) -> list[str]:
    """Settings that make a recipe smaller, the most promising first; none where it fits."""
    if needed.total <= free:
        return []
    found = []
    state = needed.weights + needed.optimizer
    if needed.activations > state:
        found += ["decompose.plan_memory=auto", "a smaller decompose.batch"]
    spannable = recipe.importance.kind == "vector" and recipe.target.kind == "huggingface"
    if gates_largest and spannable and recipe.importance.basis != "span":
        found.append("importance.basis=span")
    if gates_largest:
        found.append("a smaller importance.gate_width")
    return [*found, "a smaller slices.C", "fewer slices.matrices"]
