"""Ablation in a toy of sparse features: what every feature's own output loses without some slices, or whole matrices.

Each feature is fed alone. Slices get the mask 0 in the decomposed model, whose other masks are those of `ablation.py`;
without slices it is the target that loses matrices. F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.edits.ablation import USUAL_MASKING, Cut, Masking, Masks, draw_masks, without
from spdcli.edits.suppression import Address, by_matrix
from spdcli.edits.zeroing import Zeroed, silenced
from spdcli.engine.forward import Clean, clean_pass, outputs_after, plan_pass
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Target
from spdcli.engine.variants import Piece, Variant
from spdcli.measures.importances import importances_of
from spdcli.runs.subject import Subject
from spdcli.targets.sparse_features import single_features


@dataclass(frozen=True)
class FeatureChange:
    """What becomes of the outputs when one `feature` is on: its own output `before` and `after`, the largest change of
    `another` output (its size), and the mean squared change of all outputs."""

    feature: int
    before: float
    after: float
    another: float
    squared: float


@dataclass(frozen=True, kw_only=True)
class FeatureAblation:
    """`spd.ablate.features/1` but for the run's name: what the loss of `slices` and of `zeroed` matrices does to every
    feature, the most changed first. `others` are the masks of the slices that stay; None where the target itself loses
    matrices. `reconstruction` is the squared error of the model before, to the target."""

    slices: list[str]
    zeroed: list[str]
    others: str | None
    reconstruction: float
    effects: list[FeatureChange]


@torch.no_grad()
def ablate_features(
    subject: Subject,
    decomposition: Decomposition,
    slices: Sequence[Address] = (),
    zeroed: Sequence[Zeroed] = (),
    masking: Masking = USUAL_MASKING,
) -> FeatureAblation:
    """The effects of taking `slices` and `zeroed` away together, on every feature alone."""
    assert subject.feature_toy is not None
    target = subject.target
    batch = single_features(subject.feature_toy.features).to(target.device)
    clean = clean_pass(target, batch, ())
    if slices:
        g = importances_of(subject, decomposition, batch)[0] if masking.others != "on" else {}
        before, after = outputs_without(target, decomposition, clean, g, (slices, zeroed), masking)
    else:
        before, after = clean.outputs, mean_outputs(target, decomposition, clean, [{}], ((), zeroed))
    changes = feature_changes(before, after)
    return FeatureAblation(
        slices=[str(address) for address in slices],
        zeroed=[one.label for one in zeroed],
        others=masking.others if slices else None,
        reconstruction=(before - clean.outputs).square().mean().item(),
        effects=sorted(changes, key=lambda change: -change.squared),
    )


def outputs_without(
    target: Target, decomposition: Decomposition, clean: Clean, g: Mapping[str, Tensor], cut: Cut, masking: Masking
) -> tuple[Tensor, Tensor]:
    """Output vectors `[B, F]` of the decomposed model on the inputs of `clean`, before and after `cut` is taken away;
    `g` are importances there, for masks that need them."""
    slices, _ = cut
    masks = draw_masks(decomposition, g, len(clean.batch.tokens), masking)
    if masking.others == "on" and decomposition.delta:  # matrices that lose nothing are the target's own, exactly
        masks = [{name: one[name] for name in by_matrix(slices)} for one in masks]
    before = mean_outputs(target, decomposition, clean, masks, ((), ()))
    return before, mean_outputs(target, decomposition, clean, masks, cut)


def mean_outputs(
    target: Target, decomposition: Decomposition, clean: Clean, masks: Sequence[Masks], cut: Cut
) -> Tensor:
    """Output vectors `[B, F]` without what `cut` takes away, a mean over the draws in `masks`."""
    slices, zeroed = cut
    draws = []
    for draw in masks:
        touched = [target.matrices[name].block for name in draw] + [one.matrix.block for one in zeroed]
        if not touched:
            draws.append(clean.outputs)
            continue
        left = without(draw, slices) if slices else draw
        whole = Piece(Variant("", "importance", frozenset(left), min(touched), 1.0), 0, len(clean.batch.tokens))
        with silenced(zeroed):
            hidden = plan_pass(target, decomposition, clean, [whole], left)
        draws.append(outputs_after(target, hidden, clean.at.spots))
    return torch.stack(draws).mean(0)


def feature_changes(before: Tensor, after: Tensor) -> list[FeatureChange]:
    """From outputs `[F, F]`, whose row f is the answer to feature f alone."""
    change = (after - before).abs()
    squared = change.square().mean(1).tolist()
    others = change.fill_diagonal_(0).amax(1).tolist()
    columns = zip(before.diagonal().tolist(), after.diagonal().tolist(), others, squared, strict=True)
    return [FeatureChange(feature, *numbers) for feature, numbers in enumerate(columns)]
