"""How alike the slices of two decompositions are, and the best assignment of the one's to the other's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spdcli.engine.subcomponents import Slices


@dataclass(frozen=True, eq=False)
class Signature:
    """The active slices of one matrix, ready to compare: `labels[i]` is the slice whose features are row i.

    Similarity of two slices is the product over parts of |cos|: weights have the parts u and v, effects are one part.
    """

    labels: list[int]
    parts: tuple[Tensor, ...]


def weight_signature(slices: Slices, active: Sequence[int]) -> Signature:
    """`u` `[n, I]` and `v` `[n, O]`: |cos(u (x) v, u' (x) v')| is |cos(u, u')| |cos(v, v')|."""
    labels = list(active)
    return Signature(labels, (slices.U.t()[labels].cpu(), slices.V[labels].cpu()))


def similarity(first: Signature, second: Signature) -> Tensor:
    """|cos| of every slice of `first` with every slice of `second`, `[n, m]`, in [0, 1]."""
    result = torch.ones(len(first.labels), len(second.labels), dtype=torch.float64)
    for one, other in zip(first.parts, second.parts, strict=True):
        cosines = F.normalize(one.double(), dim=1) @ F.normalize(other.double(), dim=1).t()
        result = result * cosines.abs().clamp(max=1.0)
    return result


def match(first: Signature, second: Signature) -> dict[int, tuple[int, float]]:
    """The one-to-one assignment with the largest total similarity (Hungarian): slice -> (its partner, similarity).

    When one side has more slices, the superfluous ones are not in the result.
    """
    from scipy.optimize import linear_sum_assignment

    scores = similarity(first, second)
    rows, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    return {
        first.labels[i]: (second.labels[j], scores[i, j].item())
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
    }
