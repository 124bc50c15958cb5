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

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spdcli.engine.forward import Clean
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.target import Target
from spdcli.measures.mean import Mean


@dataclass(frozen=True)
class MatrixShare:
    """One matrix's number of `active` slices, and the means of both measures over them; None over nothing."""

    active: int
    in_weights: float | None
    in_outputs: float | None


@dataclass(frozen=True)
class TargetShare:
    """How far active slices are parts of the target: `grounding` in `spd.eval/2`.

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


@dataclass
class ShareSums:
    """Both measures, part of the data by part: by matrix which slices were `active` `[C]` bool, the shares `in_weights`
    `[C]` of all of them, and the mean of `outputs`."""

    active: dict[str, Tensor] = field(default_factory=dict)
    in_weights: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Mean] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, target: Target, slices: SliceSet, clean: Clean, g: Mapping[str, Tensor], threshold: float) -> None:
        """Where the importances `g[m]` `[B, T, C]` on the sequences of `clean` are above `threshold`."""
        for name, importances in g.items():
            matrix, own = target.matrices[name], slices.of(name)
            real = importances[clean.batch.valid]
            on = real > threshold
            places = on.any(1)
            x = clean.inputs[name][clean.batch.valid][places]
            written = output_shares(x, matrix.weight, own.U, own.V, (real * on)[places])
            if name not in self.active:
                self.active[name] = torch.zeros_like(on[0])
                self.in_weights[name] = weight_shares(matrix.weight, own.U, own.V)
                self.outputs[name], self.blocks[name] = Mean(), matrix.block
            self.active[name] |= on.any(0)
            self.outputs[name].add(written)

    def total(self) -> TargetShare:
        """Over all that was added."""
        weights = {name: shares[self.active[name]] for name, shares in self.in_weights.items()}
        counts: dict[int, int] = defaultdict(int)
        everywhere = Mean()
        for name, own in self.outputs.items():
            counts[self.blocks[name]] += len(weights[name])
            everywhere.join(own)
        total = sum(counts.values())
        return TargetShare(
            in_weights=_mean(torch.cat(list(weights.values()))),
            in_outputs=everywhere.value if everywhere.count else None,
            blocks=dict(sorted(counts.items())),
            last_block=counts[max(counts)] / total if total else None,
            by_matrix={
                name: MatrixShare(len(weights[name]), _mean(weights[name]), own.value if own.count else None)
                for name, own in self.outputs.items()
            },
        )


def target_share(
    target: Target, slices: SliceSet, clean: Clean, g: Mapping[str, Tensor], threshold: float
) -> TargetShare:
    """Both measures where the importances `g[m]` `[B, T, C]` on the prompts of `clean` are above `threshold`."""
    sums = ShareSums()
    sums.add(target, slices, clean, g, threshold)
    return sums.total()


def _mean(values: Tensor) -> float | None:
    return values.double().mean().item() if len(values) else None
