"""How V1 carries m's identity to s2, and how many directions that takes: the second step of the circuit (6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spdcli.measures.circuit_data import CircuitData

DIRECTIONS = 16  # how far the decoding of tokens is followed


@dataclass(frozen=True)
class Identity:
    """The rank of V1, and of what it takes to tell the tokens apart.

    `singular_values` of the active part of `U V`, the largest first, and those of W; of the former the
    `participation` ratio `(sum s^2)^2 / sum s^4`, and how many exceed 1 % of the largest. `decoding[k - 1]` is the
    share of sequences whose m is the token nearest by the toy's own unembedding when s2 gets from m the first k
    principal directions of what the masked V1 writes there (through the output projection of a toy that has one), and
    nothing else.
    """

    singular_values: Sequence[float]
    singular_values_target: Sequence[float]
    participation: float
    above_one_percent: int
    decoding: Sequence[float]


def identity(data: CircuitData) -> Identity:
    """Measured on the active slices of V1, and on what they write at m on the sequences of `data`."""
    own, active = data.decomposition.of("V1"), data.active["V1"]
    values = torch.linalg.svdvals(own.U[:, active] @ own.V[active])
    squares = values.square()
    return Identity(
        singular_values=values.tolist(),
        singular_values_target=torch.linalg.svdvals(data.target.matrices["V1"].weight).tolist(),
        participation=(squares.sum().square() / squares.square().sum().clamp(min=1e-30)).item(),
        above_one_percent=int((values > 0.01 * values.max()).sum()),
        decoding=_decoding(data, data.carried()),
    )


def _decoding(data: CircuitData, written: Tensor) -> list[float]:
    """The share of sequences told right from the first k directions of `written` `[B, D]`, k from 1 on."""
    base = data.clean.entries[-1][data.rows, data.at["s2"]]
    directions = torch.linalg.svd(written, full_matrices=False).Vh
    answers = data.clean.batch.answers
    assert answers is not None
    shares = []
    for k in range(1, min(DIRECTIONS, len(directions)) + 1):
        hidden = base + (written @ directions[:k].t()) @ directions[:k]
        nearest = F.linear(data.target.finish(hidden), data.target.unembedding).argmax(-1)
        shares.append(nearest.eq(answers).float().mean().item())
    return shares
