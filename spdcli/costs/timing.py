"""How long a step takes here: a few steps of the training loop itself, on random weights of the recipe's sizes."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch

from spdcli.costs.machine import synchronise
from spdcli.costs.subjects import untrained_subject
from spdcli.engine.fit import FitSettings, fit, start_fit
from spdcli.recipe import Recipe
from spdcli.settings import allow_tensor_cores, optimiser_settings
from spdcli.subject import stream_batches, untrained_decomposition

ENOUGH_SECONDS, ENOUGH_STEPS = 6.0, 20  # of measured steps; one is made whatever it takes
FIRST_ENOUGH = 20.0  # seconds; where the first step takes longer, that is the answer
TOGETHER_ON_GPU = 5  # steps between two readings of the clock, so that the host may run ahead as it does in training


def time_a_step(recipe: Recipe, names: list[str], settings: FitSettings, device: torch.device) -> float:
    """Seconds of a step on `device`: the median of the steps after the first, in which memory is asked for."""
    allow_tensor_cores(recipe.decompose.precision)
    torch.manual_seed(recipe.seed)
    subject = untrained_subject(recipe, device)
    decomposition = untrained_decomposition(recipe, subject, names, device)
    state = start_fit(
        decomposition, optimiser_settings(recipe.decompose), recipe.seed, device, recipe.decompose.slice_rate
    )
    together = TOGETHER_ON_GPU if device.type == "cuda" else 1
    enough = 1 + ENOUGH_STEPS * together
    few = replace(settings, steps=enough + 1, log_every=enough + 2, prune_step=None)
    steps = fit(subject.target, decomposition, subject.batches, state, few, stream_batches(recipe, subject))

    def seconds_of(count: int) -> float:
        synchronise(device)
        begun = time.perf_counter()
        for _ in range(count):
            next(steps)
        synchronise(device)
        return (time.perf_counter() - begun) / count

    first = seconds_of(1)
    if first > FIRST_ENOUGH:
        return first
    until, measured = time.perf_counter() + ENOUGH_SECONDS, [seconds_of(together)]
    while time.perf_counter() < until and len(measured) < ENOUGH_STEPS:
        measured.append(seconds_of(together))
    return statistics.median(measured)
