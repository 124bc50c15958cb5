"""Optimizers and learning-rate schedules, shared by the toy's training and the decomposition's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from spdcli.engine.part_tables import OPTIMIZERS, SCHEDULES


@dataclass(frozen=True)
class OptimiserSettings:
    """`optimizer` is a key of `part_tables.OPTIMIZERS`, `schedule` one of `part_tables.SCHEDULES`.

    `warmup` is a number of steps; the rate climbs linearly through them to `learning_rate`.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    schedule: str
    warmup: int
    steps: int


def warmup_steps(warmup: float, steps: int) -> int:
    """A recipe's warm-up as a number of steps: below 1 it is a fraction of `steps`."""
    return round(warmup * steps) if warmup < 1 else round(warmup)


def constant(progress: float) -> float:
    """1, whatever the share `progress` of the steps after the warm-up that is done."""
    return 1.0


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine, as `progress` goes from 0 to 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """From 1 to 0 along a line, as `progress` goes from 0 to 1."""
    return 1.0 - progress


def rate_factor(step: int, settings: OptimiserSettings) -> float:
    """What multiplies the learning rate at `step` (from 0)."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = min(1.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup))
    return SCHEDULES[settings.schedule].load()(progress)


def make_optimiser(groups: list[dict], settings: OptimiserSettings) -> torch.optim.Optimizer:
    """The optimizer over parameter `groups`; `set_rate` moves its learning rate along the schedule."""
    kind = OPTIMIZERS[settings.optimizer].load()
    return kind(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, settings: OptimiserSettings, step: int, share: float = 1.0) -> float:
    """Set the learning rate of `step` (from 0) to `share` of the schedule's, and return it; a group's `factor`
    multiplies its own."""
    rate = settings.learning_rate * rate_factor(step, settings) * share
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
    return rate
