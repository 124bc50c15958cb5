"""How the training of a toy starts, whatever toy it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from spdcli.engine.fit import FitState
from spdcli.engine.optimise import OptimiserSettings, make_optimiser
from spdcli.errors import SpdError

Trainee = TypeVar("Trainee", bound=nn.Module)


def start_toy(
    make: Callable[[], Trainee], settings: OptimiserSettings, seed: int, device: torch.device
) -> tuple[Trainee, FitState]:
    """The toy that `make` gives, at step 0, and the state of its training; its data come from generator `data`."""
    torch.manual_seed(seed)
    toy = make().to(device)
    trained = [parameter for parameter in toy.parameters() if parameter.requires_grad]
    optimiser = make_optimiser([{"params": trained}], settings)
    return toy, FitState(optimiser, settings, {"data": torch.Generator().manual_seed(seed)})


def toy_diverged(what: str, step: int) -> SpdError:
    """The error of a toy whose training came to numbers that are not finite."""
    return SpdError(f"training the toy: {what} at step {step}", "lower train.learning_rate or lengthen train.warmup")
