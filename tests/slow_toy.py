"""The toy, one sequence and one query at a time."""

from __future__ import annotations

import math

import torch


def slow_toy(toy, tokens, weight_at):
    """The toy on one sequence, query by query: log-probabilities at the last position, and attention rows.

    `weight_at(name, position)` is the matrix `[I, O]` that stands in for `name` there.
    Returns also what every matrix reads, `[T, I]`.
    """
    hidden = toy.embed(tokens)
    heads, reads, rows = toy.shape.heads, {}, {}
    for layer in range(len(toy.blocks)):
        placed = hidden + toy.positions[: len(tokens)]
        reads |= {f"Q{layer}": placed, f"K{layer}": placed, f"V{layer}": hidden}
        q, k, v = (
            torch.stack([x @ weight_at(f"{letter}{layer}", t) for t, x in enumerate(reads[f"{letter}{layer}"])])
            for letter in "QKV"
        )
        added = torch.zeros_like(hidden)
        for head in range(heads):
            own = slice(head * q.shape[1] // heads, (head + 1) * q.shape[1] // heads)
            for t in range(len(tokens)):
                scores = torch.stack([q[t, own] @ k[s, own] for s in range(t + 1)]) / math.sqrt(q.shape[1] / heads)
                rows[layer, head, t] = scores.log_softmax(0)
                added[t, own] = sum(rows[layer, head, t][s].exp() * v[s, own] for s in range(t + 1))
        hidden = hidden + added
    return (toy.unembed.weight @ hidden[-1]).log_softmax(0), rows, reads
