"""What training keeps of every parameter: its value, its gradient and Adam's two moments."""

from __future__ import annotations

from torch import nn

STATES = 3  # besides the value


def training_bytes(parameters: int, element: int) -> int:
    """Bytes of so many trained parameters with all that is kept of them: what a run needs whatever its batch is."""
    return (1 + STATES) * element * parameters


def unborn_bytes(module: nn.Module) -> int:
    """Bytes that training will still ask for: gradients and moments of a module that has its values."""
    return STATES * sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
