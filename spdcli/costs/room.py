"""Whether there is room for a recipe, before anything is allocated, read or trained.

First by sums over its sizes, so that not even the tokens of an absurd batch are drawn; then, where that leaves it open,
by the estimate that `spd plan` tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from spdcli.costs.estimate import amount, counted
from spdcli.errors import SpdError
from spdcli.machine import free_bytes, training_bytes
from spdcli.recipe.reading import LoadedRecipe
from spdcli.recipe.schema import HuggingFaceTarget, InductionTarget, Recipe, ResidMLPTarget, TMSTarget, ToyTarget
from spdcli.runs.settings import SEQUENCES_AT_ONCE

TOKEN, NUMBER = 8, 4  # bytes
PLENTY = 20  # times the smallest need: with so much free no step has to be counted


@dataclass(frozen=True)
class Least:
    """Bytes without which one part of the work cannot be, what that part is, and the settings that make it so large."""

    bytes: int
    part: str
    settings: str


def least_needs(recipe: Recipe) -> Iterator[Least]:
    """What a toy, its training, its decomposition and its evaluation need at least; nothing of other targets, whose
    sizes are not in the recipe."""
    target = recipe.target
    if not isinstance(target, ToyTarget):
        return
    matrices, C = len(target.matrix_names), recipe.slices.C
    if isinstance(target, InductionTarget):
        length, width, layers, heads = target.length, target.d_model, target.layers, target.heads
        weights = 2 * target.vocabulary * width + 3 * layers * width**2
        narrow, answer, sizes = width, target.vocabulary, "target.length, target.d_model or target.vocabulary"
    else:
        assert isinstance(target, TMSTarget | ResidMLPTarget)
        length, heads, layers = 1, 0, target.layers if isinstance(target, ResidMLPTarget) else 1
        width = target.d_model if isinstance(target, ResidMLPTarget) else target.hidden
        hidden = target.d_mlp if isinstance(target, ResidMLPTarget) else target.features
        weights = width * target.features + layers * width * hidden
        narrow, answer, sizes = min(hidden, width), target.features, "target.features"
    position = TOKEN + NUMBER * width * (1 + layers)
    if recipe.train is not None and target.path is None:
        yield Least(training_bytes(weights, NUMBER), "the toy's parameters and their training", sizes)
        batch = recipe.train.batch * (length * position + NUMBER * answer)
        yield Least(batch, f"a step of the toy's training on {recipe.train.batch:,} sequences", f"train.batch, {sizes}")
    gate = narrow * recipe.importance.gate_width if recipe.importance.kind in ("vector", "attention") else 1
    slices = matrices * C * (narrow + gate)
    yield Least(training_bytes(slices, NUMBER), f"{C:,} slices of a matrix and their gates", "slices.C")
    each = length * (position + 2 * NUMBER * matrices * C) + NUMBER * answer
    batch = recipe.decompose.batch
    yield Least(batch * each, f"a step on {batch:,} sequences", f"decompose.batch, slices.C, {sizes}")
    looked_into = NUMBER * layers * heads * length**2  # the attention patterns that spd eval compares
    measured = SEQUENCES_AT_ONCE * (each + looked_into)
    yield Least(measured, f"the evaluation, on {SEQUENCES_AT_ONCE} sequences at once", f"slices.C, {sizes}")


def refuse_without_room(loaded: LoadedRecipe, device: torch.device, processes: int = 1, here: int = 1) -> None:
    """SpdError, naming settings to change, where a recipe needs more memory than is free on `device`: each of so many
    `processes`, of which so many are `here`."""
    recipe = loaded.recipe
    least = refuse_beyond_reason(recipe, device)
    if isinstance(recipe.target, HuggingFaceTarget) or PLENTY * least > free_bytes(device):
        counts = counted(loaded, device, processes, here)
        if not counts.fits:
            raise does_not_fit(recipe, counts.need.total, counts.free, counts.change, here)


def refuse_beyond_reason(recipe: Recipe, device: torch.device) -> int:
    """The largest of `least_needs`, in bytes; SpdError at the first that is more than is free on `device`."""
    needs, free = list(least_needs(recipe)), free_bytes(device)
    for need in needs:
        if need.bytes > free:
            raise SpdError(
                f"{recipe.name} does not fit: {need.part} needs {amount(need.bytes)} at least, and {amount(free)} are "
                "free",
                f"--set a smaller {need.settings}",
            )
    return max((need.bytes for need in needs), default=0)


def does_not_fit(recipe: Recipe, needed: int, free: int, change: list[str], processes: int = 1) -> SpdError:
    """What is said where so many `processes` of a recipe need more than is free."""
    them = f"each of {processes} processes" if processes > 1 else "it"
    return SpdError(
        f"{recipe.name} does not fit: {them} needs {amount(needed)}, and {amount(free)} are free",
        f"--set {', or '.join(change)}",
    )
