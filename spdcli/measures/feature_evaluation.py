"""The evaluation of a toy of sparse features: whether its known parts were found, and nothing else.

The parts of a matrix that reads features are one a feature: what it writes for that feature alone. Table 1 of the first
SPD paper compares slices with them by the mean max cosine similarity and the mean L2 ratio. Which slices live is read
off inputs of one feature each, as in its Figures 8 and 12. F features, I d_in, O d_out, C slices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, clean_pass, masked_logits
from spdcli.engine.masks import importance_masks
from spdcli.engine.subcomponents import Decomposition, Slices
from spdcli.measures.evaluation_data import with_importances
from spdcli.measures.evaluation_totals import Sums, Totals
from spdcli.measures.mean import Mean
from spdcli.measures.target_and_masked import TargetAndMasked
from spdcli.progress import Report, silent
from spdcli.runs.subject import Subject
from spdcli.targets.feature_toys import FeatureToy
from spdcli.targets.sparse_features import single_features

LIVE = 0.1  # the importance above which the first SPD paper counts a slice as active


@dataclass(frozen=True)
class PartsFound:
    """How well the live slices of a matrix are its parts, one a feature.

    `mean_max_cosine` is a mean over features of the largest cosine similarity of the feature's part with what a slice
    writes for it; `l2_ratio` a mean of the norm of that slice's over that of the part. Both are None where no slice
    lives. `own` counts the features that have a slice of their own: alone live on that feature, and on no other.
    """

    mean_max_cosine: float | None
    l2_ratio: float | None
    own: int


@dataclass(frozen=True, kw_only=True)
class FeatureEvaluation(Totals):
    """`spd.eval/2` of a toy of sparse features: `active` by matrix is the mean number of active slices on the `data`,
    and on a `single` feature.

    The reconstruction losses of `metrics` are squared errors (`output_loss`), a mean over outputs. `live` counts by
    matrix the slices of importance above `live_above` on some feature alone, and `parts` are those of the matrices that
    read features. `error` is the squared error to what the toy was trained to answer.
    """

    active: Mapping[str, Mapping[str, float]]
    output_loss: str
    live_above: float
    live: Mapping[str, int]
    parts: Mapping[str, PartsFound]
    error: TargetAndMasked[float]


def evaluate_features(
    subject: Subject, decomposition: Decomposition, inputs: int, threshold: float, seed: int, report: Report = silent
) -> FeatureEvaluation:
    """A toy of sparse features on so many fresh `inputs`, and on every feature alone."""
    toy = subject.feature_toy
    assert toy is not None
    sums = Sums.start(subject.target, decomposition, threshold, seed)
    active: dict[str, int] = defaultdict(int)
    target_error, masked_error = Mean(), Mean()
    for clean, g in with_importances(subject, decomposition, inputs, seed, report):
        sums.add(clean, g)
        for name, values in g.items():
            active[name] += int((values > threshold).sum())
        answers = masked_logits(subject.target, decomposition, clean, importance_masks(g, decomposition.delta))
        for mean, outputs in ((target_error, clean.outputs), (masked_error, answers)):
            mean.add(_label_errors(toy, clean, outputs))
    alone = feature_importances(subject, decomposition)
    reads = {name: read for name, read in toy.reads().items() if name in alone}
    weights = {name: subject.target.matrices[name].weight for name in reads}
    return FeatureEvaluation(
        seed=seed,
        threshold=threshold,
        **sums.totals(),
        active={
            name: {"data": active[name] / inputs, "single": (g > threshold).sum().item() / len(g)}
            for name, g in alone.items()
        },
        output_loss=subject.target.output_loss,
        live_above=LIVE,
        live={name: int((g > LIVE).any(0).sum()) for name, g in alone.items()},
        parts={
            name: parts_found(read @ weights[name], read, decomposition.of(name), alone[name])
            for name, read in reads.items()
        },
        error=TargetAndMasked(target_error.value, masked_error.value),
    )


def _label_errors(toy: FeatureToy, clean: Clean, outputs: Tensor) -> Tensor:
    """Squared error of `outputs` `[B, F]` to the labels, a mean over features: `[B]`."""
    return (outputs - toy.labels(clean.batch.tokens)[:, 0]).square().mean(-1)


@torch.no_grad()
def feature_importances(subject: Subject, decomposition: Decomposition) -> dict[str, Tensor]:
    """The importance g of every slice on every feature alone, `[F, C]` a matrix."""
    assert subject.feature_toy is not None
    batch = single_features(subject.feature_toy.features).to(subject.target.device)
    clean = clean_pass(subject.target, batch, decomposition.names)
    return {name: g[:, 0] for name, g in decomposition.importance(clean.inputs)[0].items()}


@torch.no_grad()
def parts_found(parts: Tensor, read: Tensor, slices: Slices, alone: Tensor) -> PartsFound:
    """How well live slices are the `parts` `[F, O]` of a matrix, one a feature.

    `read` `[F, I]` is what the matrix reads of each feature, `alone` `[F, C]` the importances on each feature. What
    slice c writes for feature f is `(read[f] . U[:, c]) V[c]`. Slices that do not live are left out: one of almost no
    size may point anywhere.
    """
    live = alone > LIVE
    own = int(((live.sum(1) == 1) & (live & (live.sum(0) == 1)).any(1)).sum())
    nearest = nearest_slices(parts, read, slices, alone)
    if nearest is None:
        return PartsFound(None, None, own)
    return PartsFound(nearest.cosine.mean().item(), nearest.l2_ratio.mean().item(), own)


class NearestSlices(NamedTuple):
    """For every part, `[F]` each: the live slice that is most like it, their cosine similarity, and the norm of what
    the slice writes over that of the part."""

    slice: Tensor
    cosine: Tensor
    l2_ratio: Tensor


@torch.no_grad()
def nearest_slices(parts: Tensor, read: Tensor, slices: Slices, alone: Tensor) -> NearestSlices | None:
    """The live slices that are most like the parts (see `parts_found`); None where none lives."""
    lives = (alone > LIVE).any(0)
    if not bool(lives.any()):
        return None
    inner, V = (read @ slices.U)[:, lives], slices.V[lives]
    cosine = inner.sign() * torch.cosine_similarity(parts[:, None], V[None], dim=-1)  # [F, live]
    best, which = cosine.max(1)
    size = inner.gather(1, which[:, None])[:, 0].abs() * V.norm(dim=1)[which]
    return NearestSlices(lives.nonzero()[:, 0][which], best, size / parts.norm(dim=1))
