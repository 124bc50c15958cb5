"""The losses as pure functions: faithfulness and minimality (Eq. 1), the KLs of outputs (Eq. 2 to 8) and of attention.

Which losses there are is told by `tables.LOSSES`. Every reconstruction loss is one cell of a grid there, mask source x
scope: `variants.draw_variants` says which matrices its variants replace, `masks.chunk_masks` by what masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spdcli.engine.tables import losses_where

CACHED_ELEMENTS = 1 << 17  # logits worked on at once on a processor: 512 KiB in float32
CACHED_TOKENS = 512  # of the vocabulary that one product of a processor covers

RECONSTRUCTION = losses_where(lambda loss: loss.in_grid)  # names, as in Eq. 2, 3, 5, 6


def faithfulness(pairs: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Eq. 1, left: sum over matrices of ‖W - U V‖² over the number of their weights; one number, exact.

    `pairs[m]` is W `[I, O]`, U `[I, C]` and V `[C, O]` of matrix m.

    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> faithfulness({"m": (W, W[:, :1], W[:1])}).item()  # one slice that leaves a 1 of four weights
    0.25
    """
    errors = [_Residual.apply(weight, U, V) for weight, U, V in pairs.values()]
    return torch.stack(errors).sum() / sum(weight.numel() for weight, _, _ in pairs.values())


def probed_faithfulness(pairs: Mapping[str, tuple[Tensor, Tensor, Tensor]], probes: Mapping[str, Tensor]) -> Tensor:
    """An estimate of `faithfulness` that never forms `U V`: mean over probes z of ‖z (W - U V)‖².

    `probes[m]` `[k, I]` are random signs, which makes value and gradient unbiased: E zᵀz = 1. It costs k / I of the
    exact one.
    """
    errors = []
    for name, (weight, U, V) in pairs.items():
        z = probes[name]
        errors.append((z @ weight - (z @ U) @ V).square().sum() / len(z))
    return torch.stack(errors).sum() / sum(weight.numel() for weight, _, _ in pairs.values())


class _Residual(torch.autograd.Function):
    """‖W - U V‖² and its gradients by U and V in one visit, so that the residual does not outlive it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, U: Tensor, V: Tensor) -> Tensor:
        residual = torch.addmm(weight, U, V, alpha=-1)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(residual @ V.t(), U.t() @ residual)
        return residual.square_().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope_U, slope_V = ctx.saved_tensors
        return None, -2 * grad * slope_U, -2 * grad * slope_V


def minimality(importances: Mapping[str, Tensor], valid: Tensor, p: float, epsilon: float) -> Tensor:
    """Eq. 1, right: mean over real positions of the sum over matrices and slices of `(g + eps)^p - eps^p`; one number.

    `importances[m]` is g_upper `[B, T, C]`; `valid` `[B, T]` is False at padding. The constant changes no gradient and
    makes the loss 0 where every g is: at p = 0.1, 1e-12 to the power is 0.06.
    """
    per_position = [((g + epsilon) ** p - epsilon**p).sum(-1) for g in importances.values()]
    return (torch.stack(per_position).sum(0) * valid).sum() / valid.sum()


def annealed_p(step: int, steps: int, start: float, final: float) -> float:
    """The power p of minimality at `step` (from 0) of `steps`, linear from `start` to `final`.

    >>> [round(annealed_p(step, 3, 0.9, 0.1), 2) for step in range(3)]
    [0.9, 0.5, 0.1]
    """
    return start + (final - start) * step / max(1, steps - 1)


def _relative_entropy(a: Tensor, b: Tensor, gap: Tensor) -> Tensor:
    """KL(a ‖ b) `[...]` of probabilities a, b `[..., N]` with `gap` = log a - log b: their sum of `a gap + b - a`, none
    of which is negative.

    In float32 a plain sum of `a gap` drowns a KL of 1e-7: rounding moves a whole row of log-probabilities by 1e-6.
    Where a and b are close, `a gap + b - a` is `a (exp(-gap) - 1 + gap)`, without their difference.
    """
    near = torch.expm1(-gap.clamp(-1, 1)) + gap
    return torch.where(gap.abs() <= 1, a * near, a * gap + b - a).sum(-1)


def attention_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of every query's attention, `[B, H, T]` in nats, from log-probabilities `[B, H, T, T]` of p and q.

    Keys that no query may see are -inf in both.
    """
    gap = torch.where(log_p.isneginf(), 0.0, log_p - log_q)
    return _relative_entropy(log_p.exp(), log_q.exp(), gap)


class _UnembedKl(torch.autograd.Function):
    """The KL of every row and its gradient in one visit: logits exist for one chunk of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        unembedding: Tensor,
        bias: Tensor | None,
        target: Tensor,
        index: Tensor,
        reverse: bool,
        chunk: int,
    ) -> Tensor:
        divergence = hidden.new_empty(hidden.shape[0])
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        probabilities = target.exp()
        rows_at_once = chunk if hidden.is_cuda else max(1, CACHED_ELEMENTS // unembedding.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = _logits(hidden[rows], unembedding, bias)
            for own, numbers, answer in zip(
                logits.split(rows_at_once),
                index[rows].split(rows_at_once),
                divergence[rows].split(rows_at_once),
                strict=True,
            ):
                _divergence_and_slope(
                    own, target.index_select(0, numbers), probabilities.index_select(0, numbers), answer, reverse
                )
            if slope is not None:
                torch.mm(logits, unembedding, out=slope[rows])
        ctx.save_for_backward(slope)
        return divergence

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * grad[:, None], None, None, None, None, None, None


def _logits(hidden: Tensor, unembedding: Tensor, bias: Tensor | None) -> Tensor:
    """`hidden` `[n, D]` unembedded, `[n, N]`; on a processor a part of the vocabulary at a time, which is faster."""
    logits = hidden.new_empty(hidden.shape[0], unembedding.shape[0])
    at_once = unembedding.shape[0] if hidden.is_cuda else CACHED_TOKENS
    for part, columns in zip(unembedding.split(at_once), logits.split(at_once, dim=1), strict=True):
        torch.mm(hidden, part.t(), out=columns)
    return logits if bias is None else logits.add_(bias)


def _divergence_and_slope(logits: Tensor, log_p: Tensor, p: Tensor, divergence: Tensor, reverse: bool) -> None:
    """Writes each row's KL to `divergence` `[n]`, and its gradient by the logits over `logits` `[n, N]`."""
    log_q = logits.log_softmax(-1)
    q, gap = log_q.exp(), log_p.sub_(log_q)
    if reverse:
        divergence.copy_(_relative_entropy(q, p, -gap))
        torch.mul(q, (q * gap).sum(-1, keepdim=True) - gap, out=logits)
    else:
        divergence.copy_(_relative_entropy(p, q, gap))
        torch.sub(q, p, out=logits)


def unembed_kl(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    index: Tensor,
    reverse: bool = False,
    chunk_elements: int = 1 << 23,
) -> Tensor:
    """KL between the target and what `hidden` unembeds to, `[n]` in nats, without keeping any logits.

    hidden `[n, D]` after the final norm, unembedding `[N, D]`, target `[m, N]` log-probabilities, `index` `[n]`
    says which of them each row answers to. KL(target ‖ variant), or KL(variant ‖ target) with `reverse`.
    Only `hidden` gets a gradient: the target is frozen.
    """
    chunk = max(1, chunk_elements // unembedding.shape[0])
    return _UnembedKl.apply(hidden, unembedding, bias, target, index, reverse, chunk)
