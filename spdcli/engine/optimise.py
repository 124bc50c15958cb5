"""Optimizers and learning-rate schedules, shared by the toy's training and the decomposition's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OptimiserSettings:
    """`optimizer` adam | adamw; `schedule` constant | cosine | linear (both end at 0).

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


def rate_factor(step: int, settings: OptimiserSettings) -> float:
    """What multiplies the learning rate at `step` (from 0)."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup))
    return 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimiser(groups: list[dict], settings: OptimiserSettings) -> torch.optim.Optimizer:
    """The optimizer over parameter `groups`; `set_rate` moves its learning rate along the schedule."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    return kind(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, settings: OptimiserSettings, step: int) -> float:
    """Set the learning rate of `step` (from 0), and return it; a group's `factor` multiplies its own."""
    rate = settings.learning_rate * rate_factor(step, settings)
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
    return rate
