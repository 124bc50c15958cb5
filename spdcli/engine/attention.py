"""The importance attention kernel: one function, one layout, three exact backends.

Computes line 4 of Algorithm 1 for every decomposed matrix at once,

    out_i = sum_j softmax_j((q_i . k_j + r_ij) / sqrt(K)) v_j,

where `r_ij` depends on the offset `j - i` only: a learned scalar an offset, or `q_i . R[j - i]`.
Layout everywhere: `q`, `k` `[M, B, T, K]`, `v` `[M, B, T, I]`, and `relative` `[M, 2 * S - 1]` (scalar)
or `[M, 2 * S - 1, K]` (query) for any `S >= T`; its entry `S - 1 + o` belongs to offset `o = j - i`.
M matrices, B sequences, T positions. The choice of backend never changes the result.

    dense    builds [T, T] whole; for short sequences, and the reference
    blocked  strips of queries that fit the cache, made again in backward; memory grows linearly with T
    flex     torch's flex attention, compiled; CUDA and scalar biases only
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from spdcli.engine.part_tables import BACKENDS

DENSE_LENGTH, DENSE_LENGTH_CUDA = 64, 256  # up to this length all scores at once are as fast as strips
FLEX_WIDTHS = (16, 256)  # what flex's kernels are made for; a wider head does not fit a GPU's shared memory
# Most queries of a strip, and up to how many scores the strips of several sequences are put together.
STRIP, STRIP_CUDA = (32, 1 << 17), (1024, 1 << 25)


def importance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor,
    causal: bool = False,
    backend: str = "auto",
    valid: Tensor | None = None,
) -> Tensor:
    """Line 4 of Algorithm 1, attention with a learned relative bias (Eq. 4): `[M, B, T, I]`.

    q, k `[M, B, T, K]`, v `[M, B, T, I]`, `relative` `[M, 2 S - 1]` or `[M, 2 S - 1, K]`: see the module's docstring.

    `causal` hides keys after the query, `valid` `[B, T]` those where it is False: padding (None: there is none).
    `backend` is a key of `part_tables.BACKENDS`; flex raises ValueError where it has no backward (CPU) or cannot
    express the bias (query).
    """
    longest = (relative.shape[1] + 1) // 2
    if q.shape[2] > longest:
        raise ValueError(f"{q.shape[2]} positions, but relative biases for {longest}")
    name = choose_backend(q, relative) if backend == "auto" else backend
    return BACKENDS[name].load()(q, k, v, relative, valid, causal)


def choose_backend(q: Tensor, relative: Tensor) -> str:
    """The fastest exact backend for these tensors."""
    if q.shape[2] <= (DENSE_LENGTH_CUDA if q.is_cuda else DENSE_LENGTH):
        return "dense"
    lowest, highest = FLEX_WIDTHS
    suits = relative.dim() == 2 and lowest <= q.shape[-1] <= highest and q.dtype != torch.float64
    return "flex" if q.is_cuda and suits else "blocked"


def dense_attention(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
    """The reference: every score `[M, B, T, T]` at once. Arguments and result as in `importance_attention`."""
    length = q.shape[2]
    position = torch.arange(length, device=q.device)
    offset = position - position[:, None]  # [T, T], key less query
    index = offset + (relative.shape[1] - 1) // 2
    scores = q @ k.transpose(-1, -2)
    if relative.dim() == 2:
        scores = scores + relative[:, index][:, None]
    else:
        by_offset = q @ relative[:, None].transpose(-1, -2)  # [M, B, T, 2 S - 1]
        scores = scores + by_offset.gather(-1, index.expand(*scores.shape))
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], float("-inf"))
    if causal:
        scores = scores.masked_fill(offset > 0, float("-inf"))
    return (scores / math.sqrt(q.shape[-1])).softmax(-1) @ v


@dataclass(frozen=True)
class _Strip:
    """Some queries of some sequences of one matrix, and the keys that they may see.

    b sequences, t queries, u keys. `window` are the entries of the relative table that the strip needs, `[t + u - 1]`:
    query i and key j, counted within the strip, have entry `t - 1 - i + j`.
    """

    matrix: int
    sequences: slice
    queries: slice
    keys: int
    window: slice
    causal: bool

    @property
    def of_queries(self) -> tuple[int, slice, slice]:
        return self.matrix, self.sequences, self.queries

    @property
    def of_keys(self) -> tuple[int, slice, slice]:
        return self.matrix, self.sequences, slice(self.keys)


def _strips(q: Tensor, relative: Tensor, causal: bool) -> Iterator[_Strip]:
    matrices, sequences, length = q.shape[:3]
    most_rows, elements = STRIP_CUDA if q.is_cuda else STRIP
    rows = min(length, most_rows)
    together = max(1, elements // (rows * length))
    middle = (relative.shape[1] - 1) // 2
    for matrix in range(matrices):
        for first in range(0, sequences, together):
            for start in range(0, length, rows):
                stop = min(length, start + rows)
                keys = stop if causal else length
                window = slice(middle - stop + 1, middle - start + keys)
                yield _Strip(matrix, slice(first, first + together), slice(start, stop), keys, window, causal)


def _aligned(by_offset: Tensor, keys: int) -> Tensor:
    """Of entries by offset `[b, t, t + u - 1]`, fresh and contiguous, those by key: a view `[b, t, u]`, whose row i
    begins at column t - 1 - i."""
    sequences, rows, width = by_offset.shape
    return by_offset.as_strided((sequences, rows, keys), (rows * width, width - 1, 1), rows - 1)


def _scores(q: Tensor, k: Tensor, relative: Tensor, valid: Tensor | None, strip: _Strip) -> Tensor:
    """Scaled scores of a strip, `[b, t, u]`."""
    own, keys = q[strip.of_queries], k[strip.of_keys]
    window = relative[strip.matrix, strip.window]
    by_offset = own @ window.t() if window.dim() == 2 else window.repeat(1, own.shape[1], 1)
    scale = 1.0 / math.sqrt(q.shape[-1])
    aligned = _aligned(by_offset, strip.keys)
    scores = torch.baddbmm(aligned, own, keys.transpose(1, 2), beta=scale, alpha=scale)
    if valid is not None:
        scores.masked_fill_(~valid[strip.sequences, None, : strip.keys], float("-inf"))
    if strip.causal:
        position = torch.arange(strip.keys, device=q.device)
        scores.masked_fill_(position > position[strip.queries, None], float("-inf"))
    return scores


class _Blocked(torch.autograd.Function):
    """Strip by strip in cache. Backward makes each strip's weights again, from its scores and each query's highest
    score and sum, so that nothing is kept that grows with the square of the length."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, relative: Tensor, valid: Tensor | None, causal: bool
    ) -> Tensor:
        out, tops, sums = torch.empty_like(v), q.new_empty(*q.shape[:3], 1), q.new_empty(*q.shape[:3], 1)
        for strip in _strips(q, relative, causal):
            mine = strip.of_queries
            weights = _scores(q, k, relative, valid, strip)
            torch.amax(weights, -1, keepdim=True, out=tops[mine])
            torch.sum(weights.sub_(tops[mine]).exp_(), -1, keepdim=True, out=sums[mine])
            out[mine] = (weights @ v[strip.of_keys]).div_(sums[mine])
        ctx.save_for_backward(q, k, v, relative, out, tops, sums)
        ctx.valid, ctx.causal = valid, causal
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, relative, out, tops, sums = ctx.saved_tensors
        grad_q, grad_k, grad_v, grad_relative = (torch.zeros_like(t) for t in (q, k, v, relative))
        along = (grad_out * out).sum(-1, keepdim=True)
        scale = 1.0 / math.sqrt(q.shape[-1])
        for strip in _strips(q, relative, ctx.causal):
            mine, theirs = strip.of_queries, strip.of_keys
            weights = _scores(q, k, relative, ctx.valid, strip).sub_(tops[mine]).exp_().div_(sums[mine])
            grad_v[theirs].baddbmm_(weights.transpose(1, 2), grad_out[mine])
            grad = (grad_out[mine] @ v[theirs].transpose(1, 2)).sub_(along[mine]).mul_(weights).mul_(scale)
            grad_q[mine].baddbmm_(grad, k[theirs])
            grad_k[theirs].baddbmm_(grad.transpose(1, 2), q[mine])
            table, grad_table = relative[strip.matrix, strip.window], grad_relative[strip.matrix, strip.window]
            if table.dim() == 1:
                grad = grad.sum(0, keepdim=True)
            by_offset = grad.new_zeros(*grad.shape[:2], grad.shape[1] + strip.keys - 1)
            _aligned(by_offset, strip.keys).copy_(grad)
            if table.dim() == 1:
                grad_table.add_(by_offset.sum((0, 1)))
            else:
                grad_q[mine].add_(by_offset @ table)
                grad_table.addmm_(by_offset.flatten(0, 1).t(), q[mine].flatten(0, 1))
        return grad_q, grad_k, grad_v, grad_relative, None, None


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
    """Exact attention in memory linear in T. Arguments and result as in `importance_attention`."""
    return _Blocked.apply(q, k, v, relative, valid, causal)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
    """torch's flex attention with the bias as a score change; matrices are its heads. Arguments and result as in
    `importance_attention`, but `relative` is `[M, 2 S - 1]`."""
    if not q.is_cuda and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, relative)):
        raise ValueError("flex attention has no backward on the CPU; use blocked or dense")
    if relative.dim() != 2:
        raise ValueError("flex attention cannot express a query-dependent bias; use blocked or dense")
    from torch.nn.attention.flex_attention import flex_attention as eager_flex

    middle = (relative.shape[1] - 1) // 2
    scale = 1.0 / math.sqrt(q.shape[-1])

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        biased = score + relative[head, key - query + middle] * scale
        if valid is not None:
            biased = torch.where(valid[batch, key], biased, float("-inf"))
        return torch.where(key > query, float("-inf"), biased) if causal else biased

    flex = _compiled_flex() if q.is_cuda else eager_flex
    heads_second = [t.transpose(0, 1) for t in (q, k, v)]
    return flex(*heads_second, score_mod=add_bias, scale=scale).transpose(0, 1)
