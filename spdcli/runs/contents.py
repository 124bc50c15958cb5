"""What each of a run's files holds: the one place that says so, for whoever reads them.

Names and shapes are those that the recipe and its target ask for; a checkpoint's are those of what it is loaded into.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spdcli.engine.fit import FitState
from spdcli.files import Contents, Form, forms

MOMENTS = ("exp_avg", "exp_avg_sq")  # that Adam keeps of a parameter, with the number of its steps
RECORD = {"total", "active", "seconds"}  # keys of a record of a decomposition's training


def of_module(module: nn.Module) -> Contents:
    """Of a file that holds a toy or a decomposition like `module`, whose numbers do not matter."""
    return Contents(forms(module.state_dict()))


def of_checkpoint(module: nn.Module, state: FitState, found: Mapping[str, Tensor]) -> Contents:
    """Of a checkpoint that `module` and `state` can go on from, where `found` are the tensors of the file.

    Parameters that no loss has reached have no moments yet. A persistent adversary's numbers are of the batch's shape.
    """
    parameters = [parameter for group in state.groups for parameter in group]
    optional: dict[str, Form] = {}
    for index, parameter in enumerate(parameters):
        moment = Form(tuple(parameter.shape), parameter.dtype)
        optional[f"optimizer.{index}.step"] = Form((), torch.float32)
        optional |= {f"optimizer.{index}.{name}": moment for name in MOMENTS}
    optional |= {name: Form(None, None) for name in found if name.startswith("adversary.")}
    generators = {f"generator.{name}": Form(None, torch.uint8) for name in state.generators}
    return Contents(forms(module.state_dict(), "parameters.") | generators, optional)


def is_record(value: object) -> bool:
    """Whether a line of metrics.jsonl is a record: of a step, whatever else it tells."""
    step = value.get("step") if isinstance(value, dict) else None
    return isinstance(step, int) and not isinstance(step, bool) and step >= 0


def is_whole_record(record: Mapping[str, Any]) -> bool:
    """Whether a record of `metrics.jsonl` is one of a decomposition's training, with all that is read of it."""
    if not record.keys() >= RECORD or not isinstance(record["active"], dict):
        return False
    return all(_is_number(number) for number in (record["total"], record["seconds"], *record["active"].values()))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
