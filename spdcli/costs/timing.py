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
LONG_STEP = 20.0  # seconds; where the first step takes longer, that is the answer


def time_a_step(recipe: Recipe, names: list[str], settings: FitSettings, device: torch.device) -> float:
    """Seconds of a step on `device`: the median of the steps after the first, in which memory is asked for."""
    allow_tensor_cores(recipe.decompose.precision)
    torch.manual_seed(recipe.seed)
    subject = untrained_subject(recipe, device)
    decomposition = untrained_decomposition(recipe, subject, names, device)
    state = start_fit(
        decomposition, optimiser_settings(recipe.decompose), recipe.seed, device, recipe.decompose.slice_rate
    )
    endless = replace(settings, steps=ENOUGH_STEPS + 2, log_every=ENOUGH_STEPS + 3, prune_step=None)
    steps = fit(subject.target, decomposition, subject.batches, state, endless, stream_batches(recipe, subject))

    def step() -> float:
        synchronise(device)
        begun = time.perf_counter()
        next(steps)
        synchronise(device)
        return time.perf_counter() - begun

    first = step()
    if first > LONG_STEP:
        return first
    measured: list[float] = []
    while not measured or (sum(measured) < ENOUGH_SECONDS and len(measured) < ENOUGH_STEPS):
        measured.append(step())
    return statistics.median(measured)
