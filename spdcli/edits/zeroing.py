"""Whole matrices and MLP layers of the target that write nothing (Figure 9)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spdcli.edits.suppression import find_matrix
from spdcli.engine.target import Matrix, Target
from spdcli.errors import UsageError

# How the matrices of an MLP are named below their block; the last of them ends it.
MLP_MATRICES = ("mlp.", "fc1", "fc2", "Down")


@dataclass(frozen=True, eq=False)
class Zeroed:
    """A matrix whose weight is 0, so that its bias alone is left; with `output` the bias is gone too."""

    label: str
    matrix: Matrix
    output: bool


def zeroed_matrix(target: Target, name: str) -> Zeroed:
    """A whole matrix of the target, decomposed or not. UsageError, naming the nearest, where it has none such."""
    return Zeroed(name, target.matrices[find_matrix(list(target.matrices), name, "the target has")], output=False)


def zeroed_mlp(target: Target, layer: int) -> Zeroed:
    """A whole MLP layer: nothing of it reaches the residual stream (Figure 9)."""
    if not 0 <= layer < len(target.blocks):
        raise UsageError(f"--mlp {layer}: the target has the layers 0 to {len(target.blocks) - 1}")
    own = [matrix for matrix in target.matrices.values() if matrix.block == layer and _is_mlp(matrix.name)]
    if not own:
        raise UsageError(f"--mlp {layer}: this target has no MLP")
    return Zeroed(f"mlp {layer}", own[-1], output=True)


def _is_mlp(name: str) -> bool:
    return any(name.startswith(start) or f".{start}" in name for start in MLP_MATRICES)


@contextmanager
def silenced(zeroed: Sequence[Zeroed]) -> Iterator[None]:
    """While open, the matrices in `zeroed` write nothing, in whatever forward pass the target makes."""

    def hook_of(one: Zeroed) -> Any:
        left = None if one.output else one.matrix.bias

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            own = torch.zeros_like(one.matrix.covered(output))
            return one.matrix.with_covered(output, own if left is None else own + left.to(own))

        return hook

    handles = []
    try:
        for one in zeroed:
            handles.append(one.matrix.module.register_forward_hook(hook_of(one)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def zeroed_parts(target: Target, matrices: Sequence[str] = (), layers: Sequence[str | int] = ()) -> list[Zeroed]:
    """The matrices and the MLP layers that are named, each once; the layer "all" is each. UsageError for another."""
    numbers: list[int] = []
    for layer in layers:
        if layer == "all":
            numbers += range(len(target.blocks))
        elif str(layer).removeprefix("-").isdecimal():
            numbers.append(int(layer))
        else:
            raise UsageError(f"--mlp {layer}: not a layer", f"give 0 to {len(target.blocks) - 1}, or all")
    whole = [zeroed_matrix(target, name) for name in dict.fromkeys(matrices)]
    return whole + [zeroed_mlp(target, layer) for layer in dict.fromkeys(numbers)]
