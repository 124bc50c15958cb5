"""The importance attention kernel: one function, one layout, three exact backends.

Computes line 4 of Algorithm 1 for every decomposed matrix at once,

    out_i = sum_j softmax_j((q_i . k_j + r_ij) / sqrt(K)) v_j,

where `r_ij` depends on the offset `j - i` only: a learned scalar an offset, or `q_i . R[j - i]`.
Layout everywhere: `q`, `k` `[M, B, T, K]`, `v` `[M, B, T, I]`, and `relative` `[M, 2 * S - 1]` (scalar)
or `[M, 2 * S - 1, K]` (query) for any `S >= T`; its entry `S - 1 + o` belongs to offset `o = j - i`.
M matrices, B sequences, T positions. The choice of backend never changes the result.

    dense    builds [T, T] whole; for short sequences, and the reference
    blocked  strips of queries, recomputed in backward; memory grows linearly with T
    flex     torch's flex attention, compiled; CUDA and scalar biases only
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

DENSE_LENGTH = 256  # up to this length [T, T] is small enough to be the fastest
FLEX_WIDTHS = (16, 256)  # what flex's kernels are made for; a wider head does not fit a GPU's shared memory
STRIP_ELEMENTS = 1 << 21  # scores held at once by the blocked backend


def importance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor,
    causal: bool = False,
    backend: str = "auto",
    valid: Tensor | None = None,
) -> Tensor:
    """Attention with a learned relative bias, `[M, B, T, I]` (Eq. 4; layout in the module docstring).

    `causal` hides keys after the query, `valid` `[B, T]` those where it is False: padding (None: there is none).
    `backend` is auto, dense, blocked or flex; flex raises
    ValueError where it has no backward (CPU) or cannot express the bias (query).
    """
    longest = (relative.shape[1] + 1) // 2
    if q.shape[2] > longest:
        raise ValueError(f"{q.shape[2]} positions, but relative biases for {longest}")
    chosen = choose_backend(q, relative) if backend == "auto" else backend
    return BACKENDS[chosen](q, k, v, relative, valid, causal)


def choose_backend(q: Tensor, relative: Tensor) -> str:
    """The fastest exact backend for these tensors."""
    if q.shape[2] <= DENSE_LENGTH:
        return "dense"
    lowest, highest = FLEX_WIDTHS
    suits = relative.dim() == 2 and lowest <= q.shape[-1] <= highest and q.dtype != torch.float64
    return "flex" if q.is_cuda and suits else "blocked"


def strip_attention(
    q: Tensor, k: Tensor, v: Tensor, relative: Tensor, valid: Tensor | None, start: int, causal: bool
) -> Tensor:
    """Dense attention of the queries `q` `[M, B, t, K]` at positions `start .. start + t - 1` to all keys."""
    rows, keys = q.shape[2], k.shape[2]
    middle = (relative.shape[1] - 1) // 2
    # Offsets seen by this strip: from -(start + rows - 1) to keys - 1 - start, a window of the table.
    low = middle - (start + rows - 1)
    window = relative[:, low : middle + keys - start]
    query_position = torch.arange(rows, device=q.device)[:, None]
    key_position = torch.arange(keys, device=q.device)
    index = key_position - query_position + rows - 1  # [t, T] into the window
    scores = q @ k.transpose(-1, -2)
    if relative.dim() == 2:
        scores = scores + window[:, index][:, None]
    else:
        by_offset = q @ window[:, None].transpose(-1, -2)  # [M, B, t, T + t - 1]
        scores = scores + by_offset.gather(-1, index.expand(*scores.shape))
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], float("-inf"))
    if causal:
        scores = scores.masked_fill(key_position > query_position + start, float("-inf"))
    return (scores / math.sqrt(q.shape[-1])).softmax(-1) @ v


def dense_attention(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
    """The reference: one strip that is the whole sequence."""
    return strip_attention(q, k, v, relative, valid, 0, causal)


class _Blocked(torch.autograd.Function):
    """Strips of queries one after the other; backward recomputes each strip, so that only the inputs
    are kept and no `[T, T]` ever exists."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, relative: Tensor, valid: Tensor | None, causal: bool, rows: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, relative)
        ctx.valid, ctx.causal, ctx.rows = valid, causal, rows
        out = v.new_empty(v.shape)
        for start in range(0, q.shape[2], rows):
            stop = start + rows
            out[:, :, start:stop] = strip_attention(q[:, :, start:stop], k, v, relative, valid, start, causal)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, relative = ctx.saved_tensors
        grads = [torch.zeros_like(t) for t in (q, k, v, relative)]
        whole = [t.detach().requires_grad_() for t in (k, v, relative)]
        for start in range(0, q.shape[2], ctx.rows):
            stop = start + ctx.rows
            strip = q[:, :, start:stop].detach().requires_grad_()
            with torch.enable_grad():
                out = strip_attention(strip, whole[0], whole[1], whole[2], ctx.valid, start, ctx.causal)
            pieces = torch.autograd.grad(out, [strip, *whole], grad_out[:, :, start:stop])
            grads[0][:, :, start:stop] = pieces[0]
            for total, piece in zip(grads[1:], pieces[1:], strict=True):
                total += piece
        return *grads, None, None, None


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
    """Exact attention in memory linear in T: strips of at most STRIP_ELEMENTS scores."""
    rows = max(1, min(q.shape[2], STRIP_ELEMENTS // (q.shape[0] * q.shape[1] * q.shape[2])))
    return _Blocked.apply(q, k, v, relative, valid, causal, rows)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
    """torch's flex attention with the bias as a score change; matrices are its heads."""
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


BACKENDS = {"dense": dense_attention, "blocked": blocked_attention, "flex": flex_attention}
