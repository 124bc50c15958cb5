"""The replacement kernel: a matrix's output on all rows of a plan, by masked slices on the rows that have masks.

With mask m and delta mask d such a row's output is

    x (U diag(m) V + d (W - U V)) = d (x W) + ((x U) * (m - d)) V,

every other row's `x W`. `W - U V` is never formed, and what is as wide as the slices is visited in chunks
that fit the cache; only the inner activations `x U` are kept for backward.
R rows, r of them masked, T positions, I d_in, O d_out, C slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18  # masks worked on at once: 1 MiB in float32
GPU_CHUNK_ELEMENTS = 1 << 26  # 256 MiB: small chunks would leave a GPU waiting for the next launch


@dataclass(eq=False)
class MaskedRows:
    """The rows on which a matrix is replaced, and by what masks.

    `rows` `[r]` are their numbers among the R rows of a chunk. Row `rows[i]` has the mask `mask[i]` `[T, C]`, or
    `mask[origin[i]]` where there is an `origin` `[r]`, so that rows may share one. `noise` `[r, T, C]`, numbers in
    [0, 1], moves masks towards 1: to `mask + (1 - mask) * noise`. `delta` `[r, T, 1]` are the masks of the delta
    W - U V; None is 0. Rows may share these two as well: row `rows[i]` has those of number `draw[i]` where there is a
    `draw` `[r]`. What is the same at every position may have a T of 1; of `mask`, without a gradient then.
    """

    rows: Tensor
    mask: Tensor
    delta: Tensor | None
    origin: Tensor | None = None
    noise: Tensor | None = None
    draw: Tensor | None = None

    def last(self, positions: int) -> MaskedRows:
        """The same masks at the last `positions` positions alone."""
        cut = lambda t: t if t is None or t.shape[1] <= positions else t[:, -positions:]  # noqa: E731
        return MaskedRows(self.rows, cut(self.mask), cut(self.delta), self.origin, cut(self.noise), self.draw)


def replaced_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    U: Tensor,
    V: Tensor,
    masks: MaskedRows,
    own: Tensor | None = None,
) -> Tensor:
    """The matrix's output `[R, T, O]` on x `[R, T, I]`: by masked slices on the rows of `masks`, else the target's.

    weight `[I, O]`, bias `[O]` or None, U `[I, C]`, V `[C, O]`; x, U, V and of `masks` mask, noise and delta get
    gradients. Where x has fewer positions than the masks, it has the last ones. `own` `[R, T, O]` is the target's own
    `x W + bias`, where it was worked out otherwise than here.
    """
    masks = masks.last(x.shape[1])
    rows = masks.rows
    rest = torch.ones(len(x), device=x.device).index_fill(0, rows, 0.0).argsort(descending=True)[: len(x) - len(rows)]
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        numbers = (masks.noise, masks.delta, masks.draw)
        return _Replaced.apply(x, weight, bias, U, V, masks.mask, rows, rest, masks.origin, *numbers, own)
    narrow = torch.get_autocast_dtype(device)  # autocast does not see into a kernel of one's own
    wide = [_to(tensor, narrow) for tensor in (x, weight, bias, U, V, masks.mask)]
    with torch.autocast(device, enabled=False):
        numbers = (_to(masks.noise, narrow), _to(masks.delta, narrow), masks.draw)
        return _Replaced.apply(*wide, rows, rest, masks.origin, *numbers, _to(own, narrow))


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        U: Tensor,
        V: Tensor,
        mask: Tensor,
        rows: Tensor,
        rest: Tensor,
        origin: Tensor | None,
        noise: Tensor | None,
        delta: Tensor | None,
        draw: Tensor | None,
        target_own: Tensor | None,
    ) -> Tensor:
        out = x.new_empty(*x.shape[:2], V.shape[1]) if target_own is None else target_own.clone()
        inner = x.new_empty(len(rows), x.shape[1], V.shape[0])
        for part in _chunks(x, len(rows), V.shape[0]):
            own = rows[part]
            piece = x.index_select(0, own)
            torch.matmul(piece, U, out=inner[part])
            off = _of_rows(delta, draw, part)
            answer = (inner[part] * _share(_of_rows(mask, origin, part), _of_rows(noise, draw, part), off)) @ V
            if target_own is not None:
                answer += _kept(target_own.index_select(0, own), bias, off)
            elif off is not None:
                answer += off * (piece @ weight)
            out.index_copy_(0, own, answer)
        for part in _chunks(x, len(rest) if target_own is None else 0, V.shape[0]):
            own = rest[part]
            out.index_copy_(0, own, x.index_select(0, own) @ weight)
        ctx.save_for_backward(x, weight, U, V, mask, rows, rest, origin, noise, delta, draw, inner)
        return out if bias is None or target_own is not None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, U, V, mask, rows, rest, origin, noise, delta, draw, inner = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if needs[0] else None
        grad_U, grad_V = (torch.zeros_like(U), torch.zeros_like(V)) if needs[3] else (None, None)
        grad_mask, grad_noise, grad_delta = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in ((mask, needs[5]), (noise, needs[9]), (delta, needs[10]))
        )
        for part in _chunks(x, len(rows), V.shape[0]):
            own = rows[part]
            piece_grad, piece_inner = grad.index_select(0, own), inner[part]
            drawn, off, before = _of_rows(noise, draw, part), _of_rows(delta, draw, part), _of_rows(mask, origin, part)
            share = _share(before, drawn, off)
            outward = piece_grad @ V.t()
            if grad_V is not None:
                grad_V.addmm_((piece_inner * share).flatten(0, 1).t(), piece_grad.flatten(0, 1))
            if grad_noise is not None:
                _add(grad_noise, (outward * piece_inner).mul_(1 - before), draw, part)
            if grad_mask is not None:
                moved = outward * piece_inner
                _add(grad_mask, moved if drawn is None else moved.addcmul_(moved, drawn, value=-1), origin, part)
            back = None if grad_delta is None else piece_grad @ weight.t()
            if grad_delta is not None and back is not None:
                slope = torch.linalg.vecdot(x.index_select(0, own), back) - torch.linalg.vecdot(outward, piece_inner)
                _add(grad_delta, slope[..., None], draw, part)
            outward *= share
            if grad_U is not None:
                grad_U.addmm_(x.index_select(0, own).flatten(0, 1).t(), outward.flatten(0, 1))
            if grad_x is not None:
                answer = outward @ U.t()
                if off is not None:
                    answer += (off * piece_grad) @ weight.t() if back is None else off * back
                grad_x.index_copy_(0, own, answer)
        if grad_x is not None:
            for part in _chunks(x, len(rest), V.shape[0]):
                own = rest[part]
                grad_x.index_copy_(0, own, grad.index_select(0, own) @ weight.t())
        return grad_x, None, None, grad_U, grad_V, grad_mask, None, None, None, grad_noise, grad_delta, None, None


def _kept(own: Tensor, bias: Tensor | None, delta: Tensor | None) -> Tensor | float:
    """What masked rows have beside their slices, `d x W + bias`, from the target's own `x W + bias` `[n, T, O]`.

    With d = 1 it is that to the bit.
    """
    rest = 0.0 if bias is None else bias
    return rest if delta is None else delta * own + (1 - delta) * rest


def _chunks(x: Tensor, rows: int, slices: int) -> Iterator[slice]:
    """Cuts `rows` rows into runs whose masks fit the cache."""
    size = max(1, (GPU_CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS) // (x.shape[1] * slices))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _of_rows(tensor: Tensor | None, origin: Tensor | None, part: slice) -> Any:
    """What the masked rows of `part` have of `tensor`: a row each, or the one that `origin` says."""
    return tensor if tensor is None else tensor[part] if origin is None else tensor.index_select(0, origin[part])


def _share(mask: Tensor, noise: Tensor | None, delta: Tensor | None) -> Tensor:
    """`m - d` of n of the masked rows, `[n, T, C]`: their masks before noise, their noise and their delta's masks."""
    if noise is not None:
        mask = torch.lerp(mask, mask.new_ones(()), noise)
    return mask if delta is None else mask - delta


def _add(total: Tensor, grad: Tensor, origin: Tensor | None, part: slice) -> None:
    """Adds the gradient `[n, T, ...]` of the rows of `part` to that of what they were made of (see `_of_rows`)."""
    if total.shape[1] == 1:
        grad = grad.sum(1, keepdim=True)
    if origin is None:
        total[part] += grad
    else:
        total.index_add_(0, origin[part], grad)
