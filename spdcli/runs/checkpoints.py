"""A checkpoint: everything that training needs to go on exactly where it stopped, in one file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from spdcli.engine.fit import FitState
from spdcli.errors import SpdError
from spdcli.files import load_tensors, save_tensors
from spdcli.runs.contents import of_checkpoint

NO_WAY_BACK = "--force begins the run anew"


def write_checkpoint(path: Path, before: Path | None, module: nn.Module, state: FitState) -> None:
    """Write parameters, moments, generators, adversary and step; what was at `path` is kept as `before`, if given."""
    tensors = {f"parameters.{name}": tensor for name, tensor in module.state_dict().items()}
    for index, values in state.moments().items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
    tensors |= {f"generator.{name}": g.get_state() for name, g in state.generators.items()}
    tensors |= {f"adversary.{name}": numbers for name, numbers in state.adversary.items()}
    metadata = {"step": str(state.step), "seconds": str(state.seconds), "rate_share": str(state.rate_share)}
    save_tensors(path, tensors, metadata, before)


def read_checkpoint(path: Path, module: nn.Module, state: FitState) -> None:
    """Put `module` and `state` back where `write_checkpoint` found them; SpdError where it did not write that file.

    On another kind of device than then, whose generators have another state, the noise begins anew.
    """
    tensors, metadata = load_tensors(path, partial(of_checkpoint, module, state), NO_WAY_BACK)
    try:
        step, seconds = int(metadata["step"]), float(metadata["seconds"])
        rate_share = float(metadata.get("rate_share", 1.0))  # not in older checkpoints
    except (KeyError, ValueError) as error:
        raise SpdError(f"{path}: does not say of which step it is", NO_WAY_BACK) from error
    _restore(tensors, module, state)
    state.step, state.seconds, state.rate_share = step, seconds, rate_share


def _restore(tensors: dict[str, Tensor], module: nn.Module, state: FitState) -> None:
    parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "optimizer": {}, "generator": {}, "adversary": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = tensor
    module.load_state_dict(parts["parameters"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = tensor
    state.load_moments(moments)
    for name, value in parts["generator"].items():
        if value.shape == state.generators[name].get_state().shape:
            state.generators[name].set_state(value)
    device = state.groups[0][0].device
    state.adversary = {name: numbers.to(device) for name, numbers in parts["adversary"].items()}
