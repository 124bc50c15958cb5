"""The losses as pure functions: faithfulness and minimality (Eq. 1), the KLs of outputs (Eq. 2 to 8) and of attention;
of outputs that are vectors, a squared error in the place of their KL.

Which losses there are is told by `tables.LOSSES`. Every reconstruction loss is one cell of a grid there, mask source x
scope: `variants.draw_variants` says which matrices its variants replace, `masks.chunk_masks` by what masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spdcli.engine.loss_choices import PENALTIES
from spdcli.engine.tables import losses_where
from spdcli.engine.target import AS_THEY_ARE, LogitMap, at_least_float32, log_probabilities

CACHED_ELEMENTS = 1 << 17  # logits worked on at once on a processor: 512 KiB in float32
CACHED_TOKENS = 512  # of the vocabulary that one product of a processor covers

RECONSTRUCTION = losses_where(lambda loss: loss.in_grid)  # names, as in Eq. 2, 3, 5, 6


Pairs = Mapping[str, tuple[Tensor, Tensor, Tensor]]  # W `[I, O]`, U `[I, C]`, V `[C, O]` of every matrix


def faithfulness(pairs: Pairs) -> Tensor:
    """Eq. 1, left: sum over matrices of ‖W - U V‖² over the number of their weights; one number, exact.

    `pairs[m]` is W `[I, O]`, U `[I, C]` and V `[C, O]` of matrix m.

    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> faithfulness({"m": (W, W[:, :1], W[:1])}).item()  # one slice that leaves a 1 of four weights
    0.25
    """
    return mean_over_weights(squared_errors(pairs), pairs)


def relative_faithfulness(pairs: Pairs) -> Tensor:
    """Mean over matrices of ‖W - U V‖² / ‖W‖²; one number, exact. Every matrix counts alike, whatever its size and
    scale, where `faithfulness` counts every weight alike.

    >>> W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> relative_faithfulness({"m": (W, W[:, :1], torch.tensor([[1.0, 0.0]]))}).item()  # 1² of 3² + 1² is left
    0.10000000149011612
    """
    return mean_over_matrices(squared_errors(pairs), pairs)


def squared_errors(pairs: Pairs) -> list[Tensor]:
    """‖W - U V‖² of every matrix, exact."""
    return [_Residual.apply(weight, U, V) for weight, U, V in pairs.values()]


def probed_errors(pairs: Pairs, probes: Mapping[str, Tensor]) -> list[Tensor]:
    """An estimate of `squared_errors` that never forms `U V`: mean over probes z of ‖z (W - U V)‖².

    `probes[m]` `[k, I]` are random signs, which makes value and gradient unbiased: E zᵀz = 1. It costs k / I of the
    exact one.
    """
    errors = []
    for name, (weight, U, V) in pairs.items():
        z = probes[name]
        errors.append((z @ weight - (z @ U) @ V).square().sum() / len(z))
    return errors


def mean_over_weights(errors: Sequence[Tensor], pairs: Pairs) -> Tensor:
    """The matrices' squared `errors` as a mean over all their weights, one number: `faithfulness` where they are
    exact."""
    return torch.stack(list(errors)).sum() / sum(weight.numel() for weight, _, _ in pairs.values())


def mean_over_matrices(errors: Sequence[Tensor], pairs: Pairs) -> Tensor:
    """The matrices' squared `errors`, each over ‖W‖², as a mean over matrices: `relative_faithfulness`. A W of zeros
    counts as one of norm 1."""
    sizes = torch.stack([weight.square().sum() for weight, _, _ in pairs.values()])
    return (torch.stack(list(errors)) / torch.where(sizes > 0, sizes, 1)).mean()


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


def power_penalty(g: Tensor, p: float, epsilon: float) -> Tensor:
    """`(g + eps)^p - eps^p` of importances g, any shape (Eq. 1, right).

    The constant changes no gradient and makes it 0 where g is: at p = 0.1, 1e-12 to the power is 0.06.
    """
    return (g + epsilon) ** p - epsilon**p


def smooth_l0(g: Tensor, gamma: float, epsilon: float) -> Tensor:
    """`g² / (g² + gamma²)` of importances g, any shape: about 1 where g is well above gamma, so that its sum counts
    active slices.

    Flat at 0 and of slope at most 0.65 / gamma, where a power below 1 has an infinite one: gates that hardly matter
    are not pushed off by numbers that blow up. `epsilon` plays no part.
    """
    squares = g.square()
    return squares / (squares + gamma**2)


def penalties(importances: Mapping[str, Tensor], penalty: str, annealed: float, epsilon: float) -> dict[str, Tensor]:
    """What each importance costs, `[B, T, C]` a matrix: `penalty`, a key of `loss_choices.PENALTIES`, at its parameter
    `annealed` (p or gamma). `importances[m]` is g_upper `[B, T, C]`."""
    function = PENALTIES[penalty].load()
    return {name: function(g, annealed, epsilon) for name, g in importances.items()}


def minimality(costs: Mapping[str, Tensor], valid: Tensor, positions: Tensor | None = None) -> Tensor:
    """Eq. 1, right: mean over real positions of the sum over matrices and slices of their `costs[m]` `[B, T, C]`, which
    `penalties` makes; one number. `valid` `[B, T]` is False at padding. `positions` is how many real positions there
    are, if more than these: the mean's part that these make."""
    per_position = [cost.sum(-1) for cost in costs.values()]
    return (torch.stack(per_position).sum(0) * valid).sum() / (valid.sum() if positions is None else positions)


def frequency(
    costs: Mapping[str, Tensor],
    valid: Tensor,
    tokens: float,
    positions: Tensor | None = None,
    add_up: Callable[[Sequence[Tensor]], None] | None = None,
) -> Tensor:
    """A cost of slices that are active often: sum over matrices and slices of `f log2(1 + n f)`; one number.

    f is the mean over real positions of a slice's cost, so that the sum of f is `minimality`; n is `tokens`. A slice
    that is active in one of n positions pays 1 for it, one in twice as many 1.6, in all of them log2(1 + n): slices
    that do several things at once are worth taking apart, and one that is always on has to be worth it. f is of this
    batch, which overestimates the cost of what it holds by chance: small batches count for more. `costs[m]`
    `[B, T, C]`, which `penalties` makes; `valid` `[B, T]` is False at padding.

    Where other processes have more of the batch, which has so many `positions`, `add_up` makes numbers their sum over
    all of them; the value is then that of the whole batch, its gradient what these positions make of it.
    """
    positions = valid.sum() if positions is None else positions
    frequencies = [(cost * valid[..., None]).sum((0, 1)) / positions for cost in costs.values()]
    if add_up is not None:
        wholes = [f.detach().clone() for f in frequencies]
        add_up(wholes)
        frequencies = [whole + (f - f.detach()) for whole, f in zip(wholes, frequencies, strict=True)]
    return torch.stack([(f * torch.log2(1 + tokens * f)).sum() for f in frequencies]).sum()


def annealed_value(step: int, steps: int, start: float, final: float) -> float:
    """What is annealed at `step` (from 0) of `steps`, linear from `start` to `final`.

    >>> [round(annealed_value(step, 3, 0.9, 0.1), 2) for step in range(3)]
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


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) `[...]` in nats, from log-probabilities `[..., N]` of p and q."""
    return _relative_entropy(log_p.exp(), log_q.exp(), log_p - log_q)


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
        logit_map: LogitMap,
        chunk: int,
    ) -> Tensor:
        divergence = target.new_empty(hidden.shape[0])
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        probabilities = target.exp()
        rows_at_once = chunk if hidden.is_cuda else max(1, CACHED_ELEMENTS // unembedding.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = at_least_float32(_logits(hidden[rows], unembedding, bias))
            for own, numbers, answer in zip(
                logits.split(rows_at_once),
                index[rows].split(rows_at_once),
                divergence[rows].split(rows_at_once),
                strict=True,
            ):
                _divergence_and_slope(
                    own,
                    target.index_select(0, numbers),
                    probabilities.index_select(0, numbers),
                    answer,
                    reverse,
                    logit_map,
                )
            if slope is not None:
                torch.mm(logits.to(unembedding.dtype), unembedding, out=slope[rows])
        ctx.save_for_backward(slope)
        return divergence

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * grad[:, None].to(slope.dtype), None, None, None, None, None, None, None


def _logits(hidden: Tensor, unembedding: Tensor, bias: Tensor | None) -> Tensor:
    """`hidden` `[n, D]` unembedded, `[n, N]`; on a processor a part of the vocabulary at a time, which is faster."""
    logits = hidden.new_empty(hidden.shape[0], unembedding.shape[0])
    at_once = unembedding.shape[0] if hidden.is_cuda else CACHED_TOKENS
    for part, columns in zip(unembedding.split(at_once), logits.split(at_once, dim=1), strict=True):
        torch.mm(hidden, part.t(), out=columns)
    return logits if bias is None else logits.add_(bias)


def _divergence_and_slope(
    raw: Tensor, log_p: Tensor, p: Tensor, divergence: Tensor, reverse: bool, logit_map: LogitMap
) -> None:
    """Writes each row's KL to `divergence` `[n]`, and its gradient by the raw logits over `raw` `[n, N]`."""
    logits = logit_map.of(raw)
    slope = logit_map.slope(logits)
    log_q = log_probabilities(logits)
    q, gap = log_q.exp(), log_p.sub_(log_q)
    if reverse:
        divergence.copy_(_relative_entropy(q, p, -gap))
        torch.mul(q, (q * gap).sum(-1, keepdim=True) - gap, out=raw)
    else:
        divergence.copy_(_relative_entropy(p, q, gap))
        torch.sub(q, p, out=raw)
    if logit_map != AS_THEY_ARE:
        raw *= slope


def unembed_kl(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    index: Tensor,
    reverse: bool = False,
    logit_map: LogitMap = AS_THEY_ARE,
    chunk_elements: int = 1 << 23,
) -> Tensor:
    """KL between the target and what `hidden` unembeds to, `[n]` in nats, without keeping any logits.

    hidden `[n, D]` after the final norm, unembedding `[N, D]`, target `[m, N]` log-probabilities, `index` `[n]`
    says which of them each row answers to. KL(target ‖ variant), or KL(variant ‖ target) with `reverse`. Logits are
    what `logit_map` makes of the product, in float32 or better.
    Only `hidden` gets a gradient: the target is frozen.
    """
    chunk = max(1, chunk_elements // unembedding.shape[0])
    return _UnembedKl.apply(hidden, unembedding, bias, target, index, reverse, logit_map, chunk)


def unembed_mse(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    index: Tensor,
    reverse: bool = False,
    logit_map: LogitMap = AS_THEY_ARE,
) -> Tensor:
    """Mean squared error between the target's output vectors and what `hidden` unembeds to, `[n]`.

    hidden `[n, D]` after the final norm, unembedding `[N, D]`, target `[m, N]` vectors, `index` `[n]` says which of
    them each row answers to; a mean over the N numbers of a vector. It is the same both ways, and there are no logits:
    `reverse` and `logit_map` are for KLs.

    >>> one = torch.eye(2)
    >>> unembed_mse(torch.tensor([[3.0, 1.0]]), one, None, torch.tensor([[1.0, 1.0]]), torch.tensor([0])).item()
    2.0
    """
    return (F.linear(hidden, unembedding, bias) - target.index_select(0, index)).square().mean(-1)
