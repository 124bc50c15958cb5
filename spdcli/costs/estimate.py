"""What a recipe will cost: parameters, memory, operations and seconds, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spdcli.costs.dry import META, Dry, NoNoise
from spdcli.costs.heap import Heap
from spdcli.costs.machine import describe, free_bytes, used_bytes
from spdcli.costs.replay import Replay, optimiser_seconds
from spdcli.costs.states import STATES, unborn_bytes
from spdcli.engine.fit import FitSettings
from spdcli.engine.forward import clean_pass
from spdcli.engine.step import backward_step
from spdcli.engine.subcomponents import Decomposition
from spdcli.recipe import InductionTarget, Recipe
from spdcli.recipe_file import LoadedRecipe, select_matrices
from spdcli.settings import fit_settings
from spdcli.subject import Subject, language_subject, shape_of_decomposition, toy_shape, toy_subject
from spdcli.targets.induction import InductionToy


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


def shapes_subject(recipe: Recipe) -> Subject:
    """The subject of a recipe as shapes: weights are not read, prompts are."""
    if isinstance(recipe.target, InductionTarget):
        with META:
            toy = InductionToy(toy_shape(recipe.target))
        return toy_subject(recipe, toy)
    return language_subject(recipe, META)


def estimate(loaded: LoadedRecipe, device: torch.device, seconds: bool = True) -> dict[str, Any]:
    """What `spd plan --json` shows. `seconds` False leaves out what has to be tried on the machine."""
    recipe = loaded.recipe
    heap, replay = Heap(), Replay()
    try:
        with Dry(heap) as state:
            subject = shapes_subject(recipe)
            names = select_matrices(loaded, list(subject.target.matrices))
            decomposition = shape_of_decomposition(recipe, subject, names)
            trained = [p for p in decomposition.parameters() if p.requires_grad]
            moments = [torch.empty_like(p) for p in trained for _ in range(STATES - 1)]
        held = state.alive
        process = used_bytes(device)
        free = free_bytes(device) + process  # this process goes, the other comes
        settings = fit_settings(recipe, free - process - held - unborn_bytes(decomposition))
        step = _dry_step(subject, decomposition, settings, heap, replay)
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
        "tokens": step["tokens"],
        "parameters": {"slices": parameters - gates, "gates": gates},
        "bytes": {
            "process": needed.process,
            "weights": needed.weights,
            "optimizer": needed.optimizer,
            "activations": needed.activations,
            "total": needed.total,
        },
        "free_bytes": free,
        "fits": needed.total <= free,
        "change": changes(recipe, needed, free, gates > parameters - gates),
        "flops_per_step": step["flops"],
        "bytes_per_step": step["bytes"],
        "steps": recipe.decompose.steps,
        "seconds_per_step": None,
        "seconds": None,
        "machine": describe(device),
    }
    if seconds:
        dtype = subject.target.unembedding.dtype
        a_step = replay.seconds(device) + optimiser_seconds(parameters, device, dtype)
        found |= {"seconds_per_step": a_step, "seconds": a_step * recipe.decompose.steps}
    return found


def _dry_step(
    subject: Subject, decomposition: Decomposition, settings: FitSettings, heap: Heap, replay: Replay
) -> dict[str, int]:
    """One step of the loop without numbers; with a fixed batch its clean pass is made once and not counted."""
    generator, losses = torch.Generator(), settings.losses
    patterns = losses.coefficients.get("attention", 0) > 0
    with Dry(heap) as before:
        batch = subject.batches(generator)
        fixed = batch is subject.batches(generator)
        clean = clean_pass(subject.target, batch, decomposition.names, patterns) if fixed else None
    assert before.alive >= 0
    with Dry(heap, replay) as step:
        if clean is None:
            clean = clean_pass(subject.target, batch, decomposition.names, patterns)
        backward_step(
            subject.target, decomposition, clean, losses, losses.p_start, generator, NoNoise(), settings.plan_bytes
        )
    decomposition.zero_grad(set_to_none=True)
    return {"flops": step.flops, "bytes": step.bytes, "tokens": int(batch.valid.sum())}


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
