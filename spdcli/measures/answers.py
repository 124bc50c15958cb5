"""Where a batch's answers are predicted, and how many of them are told right."""

from __future__ import annotations

import torch
from torch import Tensor

from spdcli.engine.target import Batch
from spdcli.measures.evaluation_data import looked_numbers
from spdcli.runs.subject import Subject


def answer_rows(subject: Subject, batch: Batch) -> Tensor:
    """`[B]`: the row among the n looked-at positions in which each sequence's answer is predicted."""
    numbers = looked_numbers(batch.looked)
    if subject.prompts is None:
        return numbers[batch.classes["s2"]]
    at = subject.prompts.answer_at.to(numbers.device)
    return numbers[torch.arange(len(numbers), device=numbers.device), at]


def share_right(logits: Tensor, rows: Tensor, batch: Batch) -> float:
    """The share of sequences whose answer is the likeliest token of `logits` `[n, N]` in its row of `rows` `[B]`."""
    assert batch.answers is not None
    return (logits[rows].argmax(-1) == batch.answers).double().mean().item()
