"""A target's modules that answer with masked slices while a context is open.

R rows, T positions, I d_in, O d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spdcli.engine.hidden import HiddenWatch
from spdcli.engine.product import MaskedRows, replaced_product
from spdcli.engine.rows import by_sequence
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.target import Matrix, Target, at_least_float32


@contextmanager
def replaced(
    target: Target, slices: SliceSet, masks: Mapping[str, MaskedRows], watch: HiddenWatch | None = None
) -> Iterator[None]:
    """While open, the modules of the matrices in `masks` answer with masked slices on the rows that have masks.

    Their input is `[R, T, I]` then, or as much laid flat, and their output `[R, T, O]` likewise; other rows get the
    target's own. Where the target's numbers are narrower than float32, the part of the slices is worked out in float32,
    added to what the target's own kernel gives and rounded once. `watch` is told what they give.
    """
    parts: dict[nn.Module, list[Matrix]] = {}
    for matrix in target.matrices.values():
        parts.setdefault(matrix.module, []).append(matrix)
    changed = {module: own[0] for module, own in parts.items() if any(m.name in masks for m in own)}
    entering: list[Tensor] = []  # of the block that runs

    def forward_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            by_row = by_sequence(x, entering[0]) if entering else x
            own = _own_output(module, by_row)
            wide = by_row if own is None else at_least_float32(by_row)
            outputs = [_part_output(wide, matrix, slices, masks, watch, own) for matrix in parts[module]]
            whole = outputs[0] if len(outputs) == 1 else _side_by_side(outputs, parts[module][0].groups)
            return (whole if own is None else whole.to(x.dtype)).view(*x.shape[:-1], -1)

        return forward

    blocks = {target.blocks[matrix.block] for matrix in changed.values()}

    def note(module: nn.Module, args: tuple) -> None:
        entering[:] = args[:1]

    handles = [block.register_forward_pre_hook(note) for block in blocks]
    try:
        for module in changed:
            module.forward = forward_of(module)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in changed:
            module.__dict__.pop("forward", None)


def _side_by_side(outputs: Sequence[Tensor], groups: int) -> Tensor:
    """The output `[..., O]` of a module from those of its parts, which lie side by side in each of its `groups`."""
    return torch.cat([output.unflatten(-1, (groups, -1)) for output in outputs], dim=-1).flatten(-2)


def _own_output(module: nn.Module, x: Tensor) -> Tensor | None:
    """What the module itself gives on x `[R, T, I]`, in float32, where its numbers are narrower than that; else None.

    A product in float32 would not be the target's: what differs by one rounding is far apart some blocks later.
    """
    weight = module.get_parameter("weight")
    return None if weight.dtype.itemsize >= 4 else at_least_float32(type(module).forward(module, x))


def _part_output(
    x: Tensor,
    matrix: Matrix,
    slices: SliceSet,
    masks: Mapping[str, MaskedRows],
    watch: HiddenWatch | None,
    whole: Tensor | None,
) -> Tensor:
    """The columns `[R, T, O]` of `matrix`; `whole` is its module's own output, where that is not worked out here."""
    target_own = None if whole is None else matrix.covered(whole)
    if matrix.name in masks:
        own, rows = slices.of(matrix.name), masks[matrix.name]
        known = None if target_own is None else target_own.detach()
        out = replaced_product(x, matrix.weight, matrix.bias, own.U, own.V, rows, known)
        if watch is not None:
            watch.matrix(matrix, out)
        return out
    if target_own is not None:
        return target_own
    out = x @ matrix.weight
    return out if matrix.bias is None else out + matrix.bias
