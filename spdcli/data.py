"""Sequences of the induction task (Figure 1), seeded."""

from __future__ import annotations

import torch
from torch import Tensor

from spdcli.engine.target import Batch

POSITION_CLASSES = ("s1", "m", "s2", "random")


def induction_batch(count: int, length: int, vocabulary: int, generator: torch.Generator) -> Batch:
    """`count` sequences of the induction task, each `length` tokens.

    Ordinary tokens are `0 .. vocabulary-1`, drawn uniformly; the s token is `vocabulary`. It stands
    once at a random place (s1), followed by the m token, and once at the end (s2); the answer is m.
    Only the last position is looked at.

    Returns a Batch with `tokens` `[count, length]`, `answers` `[count]` and the classes s1, m, s2, random.
    """
    tokens = torch.randint(vocabulary, (count, length), generator=generator)
    s1 = torch.randint(length - 2, (count,), generator=generator)
    rows = torch.arange(count)
    tokens[rows, s1] = vocabulary
    tokens[:, -1] = vocabulary
    positions = torch.arange(length).expand(count, length)
    classes = {
        "s1": positions == s1[:, None],
        "m": positions == s1[:, None] + 1,
        "s2": positions == length - 1,
    }
    classes["random"] = ~(classes["s1"] | classes["m"] | classes["s2"])
    return Batch(
        tokens=tokens,
        valid=torch.ones_like(tokens, dtype=torch.bool),
        looked=classes["s2"],
        answers=tokens[rows, s1 + 1],
        classes=classes,
    )


def token_name(token: int, vocabulary: int) -> str:
    """How the toy's token is written: `s`, or its number."""
    return "s" if token == vocabulary else str(token)


def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy of `logits` `[B, N]` at the last position against `answers` `[B]`, in nats."""
    return torch.nn.functional.cross_entropy(logits, answers)
