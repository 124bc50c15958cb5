"""The gate kernel: C independent two-layer MLPs that read one shared input, never held whole.

For matrix m, token n and slice c, with hidden width G,

    out[m, n, c] = sum_g act(x[m, n] . w1[m, :, g, c] + b1[m, g, c]) * w2[m, g, c] + b2[m, c].

The hidden layer `[tokens, G, C]` is far larger than everything else, so it is made for a chunk of
tokens that fits the cache (of a GPU: that keeps it busy), used, and made again in backward. Slices come
last in it: the sum over g then adds whole rows, which is several times faster than adding neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spdcli.engine.part_tables import ACTIVATIONS

CHUNK_ELEMENTS = 1 << 18  # hidden values held at once: 1 MiB in float32
GPU_CHUNK_ELEMENTS = 1 << 25  # 128 MiB: small chunks would leave a GPU waiting for the next launch


class Activation(NamedTuple):
    """An activation function of numbers: `value` of its input, and `slope`, the gradient by its input from the
    gradient by its output and the input."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


RELU = Activation(F.relu, lambda grad, before: torch.ops.aten.threshold_backward(grad, before, 0))
GELU = Activation(F.gelu, torch.ops.aten.gelu_backward)


class _VectorGates(torch.autograd.Function):
    """x `[N, I]`, w1 `[I, G*C]`, b1 `[G*C]`, w2 `[G, C]`, b2 `[C]` -> `[N, C]`, for one matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x, w1, b1, w2)
        ctx.activation = activation
        act = ACTIVATIONS[activation].load().value
        out = x.new_empty(x.shape[0], w2.shape[1])
        for start, stop in _chunks(x, w2.numel()):
            hidden = act(torch.addmm(b1, x[start:stop], w1)).view(-1, *w2.shape)
            torch.sum(hidden.mul_(w2), 1, out=out[start:stop])
        return out.add_(b2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2 = ctx.saved_tensors
        act, act_backward = ACTIVATIONS[ctx.activation].load()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_w1, grad_b1, grad_w2 = torch.zeros_like(w1), torch.zeros_like(b1), torch.zeros_like(w2)
        for start, stop in _chunks(x, w2.numel()):
            piece, piece_grad = x[start:stop], grad[start:stop, None]
            before = torch.addmm(b1, piece, w1)
            grad_w2 += act(before).view(-1, *w2.shape).mul_(piece_grad).sum(0)
            grad_before = act_backward((piece_grad * w2).flatten(1), before)
            grad_w1.addmm_(piece.t().contiguous(), grad_before)  # a transposed view is slower by a third
            grad_b1 += grad_before.sum(0)
            if grad_x is not None:
                torch.mm(grad_before, w1.t(), out=grad_x[start:stop])
        return grad_x, grad_w1, grad_b1, grad_w2, grad.sum(0), None


class _ScalarGates(torch.autograd.Function):
    """As `_VectorGates`, but slice c reads only its own scalar: x `[N, C]`, w1, b1, w2 `[G, C]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x, w1, b1, w2)
        ctx.activation = activation
        act = ACTIVATIONS[activation].load().value
        out = torch.empty_like(x)
        for start, stop in _chunks(x, w2.numel()):
            hidden = act(torch.addcmul(b1, x[start:stop, None], w1))
            torch.sum(hidden.mul_(w2), 1, out=out[start:stop])
        return out.add_(b2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2 = ctx.saved_tensors
        act, act_backward = ACTIVATIONS[ctx.activation].load()
        grad_x, grad_w1 = torch.empty_like(x), torch.zeros_like(w1)
        grad_b1, grad_w2 = torch.zeros_like(b1), torch.zeros_like(w2)
        for start, stop in _chunks(x, w2.numel()):
            piece, piece_grad = x[start:stop, None], grad[start:stop, None]
            before = torch.addcmul(b1, piece, w1)
            grad_w2 += act(before).mul_(piece_grad).sum(0)
            grad_before = act_backward(piece_grad * w2, before)
            grad_w1 += (grad_before * piece).sum(0)
            grad_b1 += grad_before.sum(0)
            torch.sum(grad_before.mul_(w1), 1, out=grad_x[start:stop])
        return grad_x, grad_w1, grad_b1, grad_w2, grad.sum(0), None


def _chunks(x: Tensor, hidden: int) -> list[tuple[int, int]]:
    tokens = x.shape[0]
    size = max(1, (GPU_CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS) // hidden)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def vector_gates(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """Gates that read the whole input: x `[N, I]`, w1 `[I, G*C]`, b1 `[G*C]`, w2 `[G, C]`, b2 `[C]`.

    Hidden unit g of slice c is column `g * C + c` of w1. Returns `[N, C]`, before the sigmoid. `activation` is a
    key of `part_tables.ACTIVATIONS`.
    """
    return _VectorGates.apply(x, w1, b1, w2, b2, activation)


def scalar_gates(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """Gates that read one inner activation each: x `[N, C]`, w1, b1, w2 `[G, C]`, b2 `[C]`; `[N, C]`."""
    return _ScalarGates.apply(x, w1, b1, w2, b2, activation)
