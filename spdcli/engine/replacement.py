"""A target's modules that answer with masked slices while a context is open.

R rows, T positions, I d_in, O d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from spdcli.engine.hidden import HiddenWatch
from spdcli.engine.product import MaskedRows, replaced_product
from spdcli.engine.rows import by_sequence
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.target import Matrix, Target, at_least_float32

Answer = Callable[[Tensor, Matrix, Tensor | None], Tensor]


def replaced(
    target: Target, slices: SliceSet, masks: Mapping[str, MaskedRows], watch: HiddenWatch | None = None
) -> AbstractContextManager[None]:
    """While open, the modules of the matrices in `masks` answer with masked slices on the rows that have masks.

    Their input is `[R, T, I]` then, or as much laid flat, and their output `[R, T, O]` likewise; other rows get the
    target's own. Where the target's numbers are narrower than float32, the part of the slices is worked out in float32,
    added to what the target's own kernel gives and rounded once. `watch` is told what they give.
    """

    def masked(x: Tensor, matrix: Matrix, known: Tensor | None) -> Tensor:
        own = slices.of(matrix.name)
        out = replaced_product(x, matrix.weight, matrix.bias, own.U, own.V, masks[matrix.name], known)
        if watch is not None:
            watch.matrix(matrix, out)
        return out

    return answering(target, masks, masked)


@contextmanager
def answering(target: Target, names: Container[str], answer: Answer) -> Iterator[None]:
    """While open, the matrices `names` answer `answer(x, matrix, known)` `[R, T, O]` to x `[R, T, I]` in the target's
    own modules.

    `known` is what the matrix itself gives where the target's numbers are narrower than float32, and x is then widened;
    None where it is not worked out.
    """
    parts: dict[nn.Module, list[Matrix]] = {}
    for matrix in target.matrices.values():
        parts.setdefault(matrix.module, []).append(matrix)
    changed = {module: own[0] for module, own in parts.items() if any(m.name in names for m in own)}
    entering: list[Tensor] = []  # of the block that runs

    def forward_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            by_row = by_sequence(x, entering[0]) if entering else x
            own = _own_output(module, by_row)
            wide = by_row if own is None else at_least_float32(by_row)
            outputs = [
                _part_output(wide, matrix, answer if matrix.name in names else None, own) for matrix in parts[module]
            ]
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


def _part_output(x: Tensor, matrix: Matrix, answer: Answer | None, whole: Tensor | None) -> Tensor:
    """The columns `[R, T, O]` of `matrix`: its `answer`, or its own output where it has none.

    `whole` is its module's own output, where that is not worked out here.
    """
    known = None if whole is None else matrix.covered(whole)
    if answer is not None:
        return answer(x, matrix, None if known is None else known.detach())
    if known is not None:
        return known
    out = x @ matrix.weight
    return out if matrix.bias is None else out + matrix.bias
