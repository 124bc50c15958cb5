"""Are a run's slices parts of the target, or computation of their own? How far active slices lie along the weights.

A decomposition of a large model on few prompts has room to cheat (appendix A.3.3): slices can write what the target
never does, most easily in its last layers. Two measures over active slices say
how far they are the target's own:

    in weights   of slice c with directions û, v̂ and size s = ‖u‖ ‖v‖: <W, û v̂ᵀ> / s, clamped to [0, 1]. A slice that is
                 what W does along its directions has 1; one that W has nothing of has 0
    in outputs   at a position where x W is the target's answer and y that of the active slices there, the share of y
                 that lies along x W: cos² of the angle between the two, 0 where they point apart

and the share of active slices in the last decomposed block, which cheating fills. Where slices read with oblique
directions (whitened duals) `in weights` is below 1 although they write exactly x W: look at both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.engine.forward import Clean
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.target import Target


@dataclass(frozen=True)
class MatrixShare:
    """One matrix's number of `active` slices, and the means of both measures over them; None over nothing."""

    active: int
    in_weights: float | None
    in_outputs: float | None


@dataclass(frozen=True)
class TargetShare:
    """How far active slices are parts of the target: `grounding` in `spd.eval/1`.

    `in_weights` and `in_outputs`, in [0, 1], are means over all active slices and over all places with active slices.
    `blocks` counts active slices by block, `last_block` is the share of them in the last decomposed one. Means over
    nothing are None.
    """

    in_weights: float | None
    in_outputs: float | None
    blocks: Mapping[int, int]
    last_block: float | None
    by_matrix: Mapping[str, MatrixShare]


def weight_shares(weight: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """How much of each slice W has itself, `[C]` in [0, 1]; 0 for a slice that is all zeros."""
    size = U.norm(dim=0) * V.norm(dim=1)
    own = ((U.t() @ weight) * V).sum(1)
    return (own / size.square().clamp(min=1e-30)).clamp(0, 1)


def output_shares(x: Tensor, weight: Tensor, U: Tensor, V: Tensor, g: Tensor) -> Tensor:
    """The share of what active slices write that lies along what W writes, `[n]`, for x `[n, I]` and importances g
    `[n, C]`."""
    ours, theirs = ((x @ U) * g) @ V, x @ weight
    along = (ours * theirs).sum(-1).clamp(min=0)
    return along.square() / (ours.square().sum(-1) * theirs.square().sum(-1)).clamp(min=1e-30)


@torch.no_grad()
def target_share(
    target: Target, slices: SliceSet, clean: Clean, g: Mapping[str, Tensor], threshold: float
) -> TargetShare:
    """Both measures where the importances `g[m]` `[B, T, C]` on the prompts of `clean` are above `threshold`."""
    by_matrix: dict[str, MatrixShare] = {}
    blocks: dict[int, int] = {}
    weights, outputs = [], []
    for name, importances in g.items():
        matrix, own = target.matrices[name], slices.of(name)
        real = importances[clean.batch.valid]
        on = real > threshold
        active = on.any(0)
        shares = weight_shares(matrix.weight, own.U, own.V)[active]
        places = on.any(1)
        x = clean.inputs[name][clean.batch.valid][places]
        written = output_shares(x, matrix.weight, own.U, own.V, (real * on)[places])
        weights.append(shares)
        outputs.append(written)
        blocks[matrix.block] = blocks.get(matrix.block, 0) + int(active.sum())
        by_matrix[name] = MatrixShare(int(active.sum()), _mean(shares), _mean(written))
    total = sum(blocks.values())
    return TargetShare(
        in_weights=_mean(torch.cat(weights)),
        in_outputs=_mean(torch.cat(outputs)),
        blocks=dict(sorted(blocks.items())),
        last_block=blocks[max(blocks)] / total if total else None,
        by_matrix=by_matrix,
    )


def _mean(values: Tensor) -> float | None:
    return values.double().mean().item() if len(values) else None
