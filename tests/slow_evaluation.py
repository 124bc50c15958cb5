"""What a slow evaluation needs: one position, one matrix, one sequence at a time, and masks that can be worked out."""

from __future__ import annotations

import pytest
import torch

from spdcli.measures import evaluation_totals

CPU = torch.device("cpu")
FLOAT32 = {"rel": 1e-4, "abs": 1e-7}  # sums in another order
NOISE = 0.25
TOY = ["target.d_model=4", "target.heads=2", "target.vocabulary=4", "target.length=6", "slices.C=3"]
LOSSES = evaluation_totals.LOSSES


@pytest.fixture(autouse=True)
def steady_noise(monkeypatch):
    """Stochastic masks of a constant draw, so that they can be worked out by hand."""

    class Steady:
        def __init__(self, generator: torch.Generator) -> None: ...

        def __call__(self, out, piece, name, kind):
            out.fill_(NOISE)

    monkeypatch.setattr(evaluation_totals, "Noise", Steady)


def unsettle(decomposition):
    """Gates that differ by slice and position; a matrix's last slice is active nowhere."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in decomposition.importances.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
            if name.endswith("b2"):
                parameter += 0.1
                parameter[-1] = -9
    return decomposition


def masked(weight, slices, g, source, delta):
    """One position's matrix: its slices by their masks, and the delta by its own."""
    mask = g if source == "importance" else g + (1 - g) * NOISE
    out = slices.U @ torch.diag(mask) @ slices.V
    if delta and source == "stochastic":
        out = out + NOISE * (weight - slices.U @ slices.V)
    return out


def stand_ins(weights, decomposition, g, chosen, source):
    """The function that gives matrix `name` at a position: masked slices for those in `chosen`, else its own weight."""

    def weight_at(name, t):
        if name not in chosen:
            return weights[name]
        return masked(weights[name], decomposition.of(name), g[name][0, t], source, decomposition.delta)

    return weight_at


def kl(log_p, log_q):
    return sum((p.exp() * (p - q)).item() for p, q in zip(log_p.double(), log_q.double(), strict=True))
