"""How long a step takes here: a few steps of the training loops themselves, on random weights of a recipe's sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch

from spdcli.costs.random_targets import untrained_subject
from spdcli.engine.fit import FitSettings, fit, start_fit
from spdcli.machine import synchronise
from spdcli.recipe.schema import Recipe
from spdcli.runs.decomposition import untrained_decomposition
from spdcli.runs.settings import allow_tensor_cores, optimiser_settings
from spdcli.runs.subject import begin_toy, toy_training
from spdcli.runs.text_data import stream_batches

ENOUGH_SECONDS, ENOUGH_STEPS = 6.0, 20  # of measured steps; one is made whatever it takes
FIRST_ENOUGH = 20.0  # seconds; where the first step takes longer, that is the answer
TOGETHER_ON_GPU = 5  # steps between two readings of the clock, so that the host may run ahead as it does in training
ENDLESS = 10**9  # steps: more than are made


def seconds_of_a_step(recipe: Recipe, names: list[str], settings: FitSettings, device: torch.device) -> float:
    """Seconds of a step of the decomposition on `device`."""
    allow_tensor_cores(recipe.decompose.precision)
    torch.manual_seed(recipe.seed)
    subject = untrained_subject(recipe, device)
    decomposition = untrained_decomposition(recipe, subject, names, device)
    state = start_fit(
        decomposition, optimiser_settings(recipe.decompose), recipe.seed, device, recipe.decompose.slice_rate
    )
    endless = replace(settings, steps=ENDLESS, log_every=ENDLESS, prune_step=None)
    return _median(
        fit(subject.target, decomposition, subject.batches, state, endless, stream_batches(recipe, subject)), device
    )


def seconds_of_a_toy_step(recipe: Recipe, device: torch.device) -> float:
    """Seconds of a step of the toy's own training on `device`."""
    assert recipe.train is not None
    endless = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": ENDLESS, "log_every": 1})})
    return _median(toy_training(endless, *begin_toy(endless, device)), device)


def _median(steps: Iterator[object], device: torch.device) -> float:
    """Seconds of one of `steps`: the median of a few after the first, in which memory is asked for."""

    def took(count: int) -> float:
        synchronise(device)
        begun = time.perf_counter()
        for _ in islice(steps, count):
            pass
        synchronise(device)
        return (time.perf_counter() - begun) / count

    first = took(1)
    if first > FIRST_ENOUGH:
        return first
    together = TOGETHER_ON_GPU if device.type == "cuda" else 1
    until, measured = time.perf_counter() + ENOUGH_SECONDS, [took(together)]
    while time.perf_counter() < until and len(measured) < ENOUGH_STEPS:
        measured.append(took(together))
    return statistics.median(measured)
