"""The code of the rows in `added_rows.py`, which they name and which is imported when it is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spdcli.engine.importance import ImportanceSettings
from spdcli.engine.variants import Drawing, Piece, Selection


def half(out: Tensor, piece: Piece, name: str, kind: str, noise: object) -> None:
    out.fill_(0.5)


def neighbours(names: list[str], drawing: Drawing) -> list[Selection]:
    return [Selection(names[at : at + 2]) for at in range(0, len(names), 2)]


class AffineGates(nn.Module):
    def __init__(self, d_in: int, slices: int, settings: ImportanceSettings) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(d_in, slices) / d_in**0.5)
        self.b = nn.Parameter(torch.full((slices,), settings.gate_bias))

    def forward(self, x: Tensor, alive: Tensor) -> Tensor:
        return torch.where(alive, x @ self.w + self.b, -1.0)


def ones_start(weight: Tensor, slices: int, *data: object) -> tuple[Tensor, Tensor]:
    return weight.new_ones(weight.shape[0], slices), weight.new_ones(slices, weight.shape[1]) / weight.numel()


def steep(progress: float) -> float:
    return (1 - progress) ** 2
