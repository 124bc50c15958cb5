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
    W - U V; None is 0. Masks that are the same at every position may have a T of 1, but no gradient then.
    """

    rows: Tensor
    mask: Tensor
    delta: Tensor | None
    origin: Tensor | None = None
    noise: Tensor | None = None

    def last(self, positions: int) -> MaskedRows:
        """The same masks at the last `positions` positions alone."""
        cut = lambda t: t if t is None or t.shape[1] <= positions else t[:, -positions:]  # noqa: E731
        return MaskedRows(self.rows, cut(self.mask), cut(self.delta), self.origin, cut(self.noise))


def replaced_product(x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, V: Tensor, masks: MaskedRows) -> Tensor:
    """The matrix's output `[R, T, O]` on x `[R, T, I]`: by masked slices on the rows of `masks`, else the target's.

    weight `[I, O]`, bias `[O]` or None, U `[I, C]`, V `[C, O]`; x, U, V and `masks.mask` get gradients. Where x has
    fewer positions than the masks, it has the last ones.
    """
    masks = masks.last(x.shape[1])
    rows = masks.rows
    rest = torch.ones(len(x), device=x.device).index_fill(0, rows, 0.0).argsort(descending=True)[: len(x) - len(rows)]
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return _Replaced.apply(x, weight, bias, U, V, masks.mask, rows, rest, masks.origin, masks.noise, masks.delta)
    narrow = torch.get_autocast_dtype(device)  # autocast does not see into a kernel of one's own
    wide = [_to(tensor, narrow) for tensor in (x, weight, bias, U, V, masks.mask)]
    with torch.autocast(device, enabled=False):
        return _Replaced.apply(*wide, rows, rest, masks.origin, _to(masks.noise, narrow), _to(masks.delta, narrow))


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
    ) -> Tensor:
        out = x.new_empty(*x.shape[:2], V.shape[1])
        inner = x.new_empty(len(rows), x.shape[1], V.shape[0])
        for part in _chunks(x, len(rows), V.shape[0]):
            own = rows[part]
            piece = x.index_select(0, own)
            torch.matmul(piece, U, out=inner[part])
            answer = (inner[part] * _share(part, mask, origin, noise, delta)) @ V
            if delta is not None:
                answer += delta[part] * (piece @ weight)
            out.index_copy_(0, own, answer)
        for part in _chunks(x, len(rest), V.shape[0]):
            own = rest[part]
            out.index_copy_(0, own, x.index_select(0, own) @ weight)
        ctx.save_for_backward(x, weight, U, V, mask, rows, rest, origin, noise, delta, inner)
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, U, V, mask, rows, rest, origin, noise, delta, inner = ctx.saved_tensors
        want_x, want_slices, want_mask = ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        grad_x = torch.empty_like(x) if want_x else None
        grad_U, grad_V = (torch.zeros_like(U), torch.zeros_like(V)) if want_slices else (None, None)
        grad_mask = torch.zeros_like(mask) if want_mask else None
        for part in _chunks(x, len(rows), V.shape[0]):
            own = rows[part]
            piece_grad, piece_inner = grad.index_select(0, own), inner[part]
            share = _share(part, mask, origin, noise, delta)
            outward = piece_grad @ V.t()
            if grad_V is not None:
                grad_V.addmm_((piece_inner * share).flatten(0, 1).t(), piece_grad.flatten(0, 1))
            if grad_mask is not None:
                _add_mask_gradient(grad_mask, outward * piece_inner, part, origin, noise)
            outward *= share
            if grad_U is not None:
                grad_U.addmm_(x.index_select(0, own).flatten(0, 1).t(), outward.flatten(0, 1))
            if grad_x is not None:
                answer = outward @ U.t()
                if delta is not None:
                    answer += (delta[part] * piece_grad) @ weight.t()
                grad_x.index_copy_(0, own, answer)
        if grad_x is not None:
            for part in _chunks(x, len(rest), V.shape[0]):
                own = rest[part]
                grad_x.index_copy_(0, own, grad.index_select(0, own) @ weight.t())
        return grad_x, None, None, grad_U, grad_V, grad_mask, None, None, None, None, None


def _chunks(x: Tensor, rows: int, slices: int) -> Iterator[slice]:
    """Cuts `rows` rows into runs whose masks fit the cache."""
    size = max(1, (GPU_CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS) // (x.shape[1] * slices))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _share(part: slice, mask: Tensor, origin: Tensor | None, noise: Tensor | None, delta: Tensor | None) -> Tensor:
    """`m - d` of n of the masked rows, those of `part`: `[n, T, C]`."""
    own = mask[part] if origin is None else mask.index_select(0, origin[part])
    if noise is not None:
        own = torch.lerp(own, own.new_ones(()), noise[part])
    return own if delta is None else own - delta[part]


def _add_mask_gradient(
    grad_mask: Tensor, grad: Tensor, part: slice, origin: Tensor | None, noise: Tensor | None
) -> None:
    """Carries the gradient of some rows' `m` `[n, T, C]` back to the masks that they were made of."""
    if noise is not None:
        grad.addcmul_(grad, noise[part], value=-1)
    if origin is None:
        grad_mask[part] += grad
    else:
        grad_mask.index_add_(0, origin[part], grad)
