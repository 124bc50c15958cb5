"""σ_H of Eq. 4, the leaky-hard sigmoid: importances of the gates' values, with gradients that pass where it is flat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAK = 0.01


class _LeakyHardSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        lower = x.clamp(0, 1)
        return lower, torch.add(lower, (x - 1).clamp_(min=0), alpha=LEAK)

    @staticmethod
    def backward(ctx: Any, grad_lower: Tensor | None, grad_upper: Tensor | None) -> Tensor | None:
        (x,) = ctx.saved_tensors
        below, above = x < 0, x > 1
        grad = None
        if grad_lower is not None:
            # Descent raises x where the gradient is negative: only that leaks through, below 0.
            grad = torch.where(below, grad_lower.clamp(max=0).mul_(LEAK), grad_lower).masked_fill_(above, 0)
        if grad_upper is not None:
            upper = torch.where(above, LEAK * grad_upper, grad_upper).masked_fill_(below, 0)
            grad = upper if grad is None else grad.add_(upper)
        return grad


def leaky_hard_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """σ_H of Eq. 4: importances of the gates' values x, `g_lower` for masks and `g_upper` for minimality.

    x has any shape, `[B, T, C]` as a rule, and so have both. g_lower is x clamped to [0, 1]; below 0 a gradient that
    would raise it passes, times 0.01. g_upper is clamped below at 0 and has slope 0.01 above 1, so that large values
    come back.

    >>> lower, upper = leaky_hard_sigmoid(torch.tensor([-1.0, 0.5, 2.0]))
    >>> lower.tolist(), [round(value, 2) for value in upper.tolist()]
    ([0.0, 0.5, 1.0], [0.0, 0.5, 1.01])
    """
    return _LeakyHardSigmoid.apply(x)
