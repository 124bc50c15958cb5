"""Transformers put together by hand from rank-1 slices that are known: what a decomposition ought to find.

Every matrix is the sum of its planted slices, `W = U V`, and it is known where each is needed: with the needed slices
alone the answers stay, without any one of them they do not. Directions are skewed on purpose, unit vectors that are
linearly independent and not orthogonal, so that a singular value decomposition has other slices; the more so the more
alike their strengths are.

    induction   `planted_induction.py`: two blocks of attention that complete s m ... s with m
    lookup      `planted_lookup.py`: two MLPs that look up what the subjects of a token lead to, in two hops

Letters: B sequences, T positions, I d_in, O d_out, P planted slices of a matrix, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spdcli.engine.subcomponents import Slices
from spdcli.engine.target import Batch, Target


@dataclass(frozen=True, eq=False)
class Planted:
    """A target whose slices are known.

    `slices[m]` are those of matrix m, U `[I, P]` and V `[P, O]`. `draw(count, generator)` gives fresh sequences of
    `length` tokens, and `needed(batch)[m]` `[B, T, P]` says which slices of m each of their positions needs.
    """

    target: Target
    slices: Mapping[str, Slices]
    draw: Callable[[int, torch.Generator], Batch]
    needed: Callable[[Batch], dict[str, Tensor]]
    length: int


@dataclass(frozen=True, eq=False)
class Frame:
    """`rows` `[n, D]`, unit vectors, and `duals` `[D, n]`, which read one of them each: `rows @ duals` = 1."""

    rows: Tensor
    duals: Tensor


def skewed_frame(count: int, width: int, skew: float, generator: torch.Generator) -> Frame:
    """`count` random unit vectors in `width` dimensions that are independent and not orthogonal; float64.

    `skew` is the spread of what is added to an orthonormal frame.
    """
    orthonormal = torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.float64)).Q.t()
    added = skew * torch.randn(count, count, generator=generator, dtype=torch.float64) / count**0.5
    rows = F.normalize(orthonormal + added @ orthonormal, dim=1)
    return Frame(rows, torch.linalg.pinv(rows))


def planted_slices(read: Tensor, write: Tensor, strengths: Tensor) -> Slices:
    """Slices that read `read` `[I, P]` and write `write` `[P, O]`, `strengths` `[P]` times; float32, not trained."""
    return Slices(read.float(), (strengths[:, None] * write).float()).requires_grad_(False)


def spread_strengths(count: int, ratio: float, generator: torch.Generator) -> Tensor:
    """`[count]` strengths in geometric steps around 1, in random order, the largest `ratio` times the smallest."""
    steps = torch.linspace(-0.5, 0.5, count, dtype=torch.float64) if count > 1 else torch.zeros(1, dtype=torch.float64)
    return (ratio**steps)[torch.randperm(count, generator=generator)]


def set_weights(target: Target, slices: Mapping[str, Slices]) -> None:
    """Every matrix of the target becomes the sum of its slices."""
    with torch.no_grad():
        for name, matrix in target.matrices.items():
            matrix.weight.copy_(slices[name].U @ slices[name].V)
