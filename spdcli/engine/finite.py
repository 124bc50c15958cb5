"""Whether all losses and gradients of a training are finite, without waiting for a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from spdcli.engine.step import Step
from spdcli.errors import NotFinite


class FiniteWatch:
    """Remembers the first step with a loss or a gradient that is not finite, and stops the optimizer from then on.

    It all happens on the device, so that a GPU is never waited for until `check` asks: `see` writes the step's number
    and its losses into tensors, and a flag that fused optimizers read before they change any parameter.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, device: torch.device) -> None:
        self.broken = torch.zeros((), device=device)  # 0, and 1 from the first bad step on
        self.step = torch.zeros((), dtype=torch.long, device=device)  # the number of the first bad step
        self.values: Tensor | None = None  # the losses of that step, in the order of `Step.losses`
        optimiser.found_inf = self.broken  # type: ignore[attr-defined]  # the flag that fused optimizers read

    def see(self, number: int, step: Step, norms: dict[str, Tensor]) -> None:
        """Look at the losses of `step`, whose number is `number`, and at the norms of its gradients."""
        losses = torch.stack([loss.double() for loss in step.losses.values()])
        bad = ~(losses.isfinite().all() & torch.stack(list(norms.values())).isfinite().all())
        first = bad & (self.broken == 0)
        self.step = torch.where(first, number, self.step)
        self.values = losses if self.values is None else torch.where(first, losses, self.values)
        self.broken.copy_(torch.maximum(self.broken, bad.to(self.broken)))

    def check(self, names: Iterable[str]) -> None:
        """Wait for the device; NotFinite where a step was bad, naming it and its first loss that is not finite.

        `names` are those of the losses, in their order.
        """
        if not bool(self.broken) or self.values is None:
            return
        bad = [
            (name, value) for name, value in zip(names, self.values.tolist(), strict=True) if not math.isfinite(value)
        ]
        what = f"loss {bad[0][0]} is {bad[0][1]}" if bad else "the gradient is not finite"
        raise NotFinite(
            f"step {int(self.step)}: {what}; stopped before the parameters changed",
            "lower decompose.learning_rate, or set decompose.clip_slices and decompose.clip_gates",
            int(self.step),
        )
