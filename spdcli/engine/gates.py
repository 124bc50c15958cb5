"""The gate kernel: C independent two-layer MLPs that read one shared input, never held whole.

For matrix m, token n and slice c, with hidden width G,

    out[m, n, c] = sum_g act(x[m, n] . w1[m, :, c, g] + b1[m, c, g]) * w2[m, c, g] + b2[m, c].

The hidden layer `[tokens, C, G]` is far larger than everything else, so it is made for a chunk of
tokens that fits the cache (of a GPU: that keeps it busy), used, and made again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 1 << 19  # hidden values held at once: 2 MiB in float32
GPU_CHUNK_ELEMENTS = 1 << 25  # 128 MiB: small chunks would leave a GPU waiting for the next launch


Map = Callable[[Tensor], Tensor]


def _relu_slope(before: Tensor) -> Tensor:
    return (before > 0).to(before.dtype)


def _gelu_slope(before: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(torch.ones_like(before), before)


ACTIVATIONS: dict[str, tuple[Map, Map]] = {"relu": (F.relu, _relu_slope), "gelu": (F.gelu, _gelu_slope)}


class _VectorGates(torch.autograd.Function):
    """x `[N, I]`, w1 `[I, C*G]`, b1 `[C*G]`, w2 `[C, G]`, b2 `[C]` -> `[N, C]`, for one matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x, w1, b1, w2)
        ctx.activation = activation
        act = ACTIVATIONS[activation][0]
        out = x.new_empty(x.shape[0], w2.shape[0])
        for start, stop in _chunks(x, w2.numel()):
            hidden = act(torch.addmm(b1, x[start:stop], w1))
            out[start:stop] = _grouped_dot(hidden, w2)
        return out + b2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2 = ctx.saved_tensors
        act, slope = ACTIVATIONS[ctx.activation]
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_w1, grad_b1, grad_w2 = torch.zeros_like(w1), torch.zeros_like(b1), torch.zeros_like(w2)
        for start, stop in _chunks(x, w2.numel()):
            piece = x[start:stop]
            before = torch.addmm(b1, piece, w1)
            piece_grad = grad[start:stop, :, None]
            grad_w2 += (act(before).view(-1, *w2.shape) * piece_grad).sum(0)
            grad_before = slope(before).view(-1, *w2.shape).mul_(w2).mul_(piece_grad).flatten(1)
            grad_w1.addmm_(piece.t(), grad_before)
            grad_b1 += grad_before.sum(0)
            if grad_x is not None:
                torch.mm(grad_before, w1.t(), out=grad_x[start:stop])
        return grad_x, grad_w1, grad_b1, grad_w2, grad.sum(0), None


class _ScalarGates(torch.autograd.Function):
    """As `_VectorGates`, but slice c reads only its own scalar: x `[N, C]`, w1 `[C, G]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x, w1, b1, w2)
        ctx.activation = activation
        act = ACTIVATIONS[activation][0]
        out = torch.empty_like(x)
        for start, stop in _chunks(x, w2.numel()):
            hidden = act(torch.addcmul(b1, x[start:stop, :, None], w1))
            out[start:stop] = _grouped_dot(hidden.flatten(1), w2)
        return out + b2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2 = ctx.saved_tensors
        act, slope = ACTIVATIONS[ctx.activation]
        grad_x, grad_w1 = torch.empty_like(x), torch.zeros_like(w1)
        grad_b1, grad_w2 = torch.zeros_like(b1), torch.zeros_like(w2)
        for start, stop in _chunks(x, w2.numel()):
            piece = x[start:stop, :, None]
            before = torch.addcmul(b1, piece, w1)
            piece_grad = grad[start:stop, :, None]
            grad_w2 += (act(before) * piece_grad).sum(0)
            grad_before = slope(before).mul_(w2).mul_(piece_grad)
            grad_w1 += (grad_before * piece).sum(0)
            grad_b1 += grad_before.sum(0)
            grad_x[start:stop] = (grad_before * w1).sum(-1)
        return grad_x, grad_w1, grad_b1, grad_w2, grad.sum(0), None


def _chunks(x: Tensor, hidden: int) -> list[tuple[int, int]]:
    tokens = x.shape[0]
    size = max(1, (GPU_CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS) // hidden)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _grouped_dot(hidden: Tensor, w2: Tensor) -> Tensor:
    """`hidden` `[n, C*G]` times `w2` `[C, G]`, summed over each group: `[n, C]`."""
    return torch.einsum("ncg,cg->nc", hidden.view(-1, *w2.shape), w2)


def vector_gates(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """Gates that read the whole input: x `[N, I]`, w1 `[I, C*G]`, b1 `[C*G]`, w2 `[C, G]`, b2 `[C]`.

    Returns `[N, C]`, before the sigmoid. `activation` is relu or gelu.
    """
    return _VectorGates.apply(x, w1, b1, w2, b2, activation)


def scalar_gates(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """Gates that read one inner activation each: x `[N, C]`, w1, b1, w2 `[C, G]`, b2 `[C]`; `[N, C]`."""
    return _ScalarGates.apply(x, w1, b1, w2, b2, activation)
