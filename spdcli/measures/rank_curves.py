"""How the KL of a model grows as less of its decomposed matrices is kept: the curves of Figure 2, for a run's slices.

    spd                 slices removed at every position, those of the smallest mean importance first
    spd_masked          the same, and those kept are masked by their importance, as SPD means them
    spd_per_position    slices removed where their importance is at most a threshold, position by position

Rank is for the first two the number of slices that the model is made of; for the third the mean number that a position
uses, so that its slices may differ from position to position. All leave the delta out. The greedy methods that they
are compared with are in `greedy_svd.py`. B sequences, T positions, C slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.masks import Noise
from spdcli.engine.reconstruction import reconstruction
from spdcli.engine.subcomponents import Decomposition, SliceSet
from spdcli.engine.target import Target
from spdcli.engine.variants import Variant, draw_variants, fixed_variant
from spdcli.measures.evaluation_data import evaluation_batches
from spdcli.runs.subject import Subject

PLAN_BYTES = 2**28  # nothing is kept for backward here, and larger chunks leave the processor's cache
DENSE = 64  # `spd` is measured at each of the lowest ranks up to this, and at as many above
EDGE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
THRESHOLDS = (0.0, *EDGE, *(tenth / 10 for tenth in range(1, 10)), *(1 - low for low in reversed(EDGE)), 1.0)

Rounds = Callable[[int, int], object]  # hears how many rounds of a method are done, and of how many


@dataclass(frozen=True)
class Point:
    """One model of a curve: what is left of every matrix, its mean KL in nats, and the threshold that cut it if any."""

    ranks: Mapping[str, float]
    kl: float
    threshold: float | None = None

    @property
    def rank(self) -> float:
        """The total over matrices."""
        return sum(self.ranks.values())


def within(curve: Sequence[Point], tolerance: float) -> Point | None:
    """Where Algorithm 2 stops: the last point before the KL first exceeds `tolerance`; None when all of it does."""
    return next(reversed([*takewhile(lambda point: point.kl <= tolerance, curve)]), None)


@dataclass(frozen=True, eq=False)
class CurveData:
    """What all methods share: the target, the run's decomposition, and what the target does on the data."""

    target: Target
    decomposition: Decomposition
    cleans: Sequence[Clean]
    noise: Noise = field(init=False)  # the engine wants one; masks that are fixed or importances never draw

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise", Noise(torch.Generator(self.target.device)))

    @property
    def names(self) -> list[str]:
        """The decomposed matrices, in the order of execution."""
        return self.decomposition.names

    @property
    def blocks(self) -> dict[str, int]:
        """The block of each of them."""
        return {name: self.target.matrices[name].block for name in self.names}

    @property
    def looked_at(self) -> int:
        """How many positions the mean KL is over."""
        return sum(len(clean.outputs) for clean in self.cleans)

    def importances(self) -> Iterator[tuple[Clean, dict[str, Tensor]]]:
        """The data, batch by batch, with `g_lower` `[B, T, C]` of every matrix."""
        for clean in self.cleans:
            yield clean, self.decomposition.importance(clean.inputs, clean.padding)[0]

    def kl_sums(
        self, slices: SliceSet, clean: Clean, variants: list[Variant], g: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """KL(target ‖ variant) summed over the looked-at positions of one batch, by the variant's name: one plan."""
        sums = {variant.loss: 0.0 for variant in variants}

        def consume(variant: Variant, part: slice, divergence: Tensor) -> None:
            sums[variant.loss] += divergence.double().sum().item()

        reconstruction(self.target, slices, clean, variants, g, self.noise, PLAN_BYTES, consume)
        return sums

    def mean_kl(self, sums: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The mean over all looked-at positions, from what `kl_sums` gives for every batch."""
        return {name: sum(part[name] for part in sums) / self.looked_at for name in sums[0]}


def curve_data(subject: Subject, decomposition: Decomposition, sequences: int, seed: int) -> CurveData:
    """The data of `spd eval`, drawn once for all methods, and one clean pass over it."""
    batches = evaluation_batches(subject, sequences, seed)
    cleans = [clean_pass(subject.target, batch, decomposition.names) for batch in batches]
    return CurveData(subject.target, decomposition, cleans)


def by_mean_importance(data: CurveData) -> list[Point]:
    """Slices kept everywhere, with mask 1, in the order of their mean importance over all real positions of the data.

    The least important go first, over all matrices together; of equal ones, the first in order. A matrix is the sum
    of its kept slices: without the delta, even where it keeps them all. One plan for the whole curve.
    """
    order = removal_order(data)
    total = sum(len(places) for places in order.values())
    dtype = data.target.precision
    variants, ranks = [], {}
    for count in counts(total):
        masks = {name: (places >= total - count).to(dtype) for name, places in order.items()}
        variants.append(fixed_variant(str(count), masks, data.blocks, delta=0.0))
        ranks[str(count)] = {name: int(mask.sum()) for name, mask in masks.items()}
    kl = data.mean_kl([data.kl_sums(data.decomposition, clean, variants, {}) for clean in data.cleans])
    return [Point(ranks[count], value) for count, value in kl.items()]


def by_kept_and_masked(data: CurveData, report: Rounds) -> list[Point]:
    """The masked model with fewer and fewer slices: a kept slice's mask is g, in the order of `by_mean_importance`.

    Rank is the number of slices kept, from all that are active anywhere on the data (the unique slices of Table 1): the
    model there is the one whose `recon` `spd eval` reports.
    """
    order = removal_order(data)
    total = sum(len(places) for places in order.values())
    active = {name: torch.zeros_like(places, dtype=torch.bool) for name, places in order.items()}
    for clean, g in data.importances():
        for name, values in g.items():
            active[name] |= (values[clean.batch.valid] > 0).any(0)
    numbers = counts(sum(int(somewhere.sum()) for somewhere in active.values()))
    variants = draw_variants(["recon"], data.blocks, 1, "forward", (0, 0), torch.Generator())
    kl = dict.fromkeys(numbers, 0.0)
    for done, (clean, g) in enumerate(data.importances()):
        report(done, len(data.cleans))
        for count in numbers:
            cut = {name: values * (order[name] >= total - count) for name, values in g.items()}
            kl[count] += data.kl_sums(data.decomposition, clean, variants, cut)["recon"]
    return [
        Point({n: int((places >= total - count).sum()) for n, places in order.items()}, kl[count] / data.looked_at)
        for count in numbers
    ]


def removal_order(data: CurveData) -> dict[str, Tensor]:
    """When each slice goes, `[C]` a matrix: first, 0, is that of the smallest mean importance over real positions."""
    means: dict[str, Tensor] = {}
    for clean, g in data.importances():
        for name, values in g.items():
            total = values[clean.batch.valid].double().sum(0)
            means[name] = means[name] + total if name in means else total
    left_at = torch.cat(list(means.values())).argsort(stable=True).argsort()
    return dict(zip(means, left_at.split([len(mean) for mean in means.values()]), strict=True))


def counts(total: int) -> list[int]:
    """At how many slices a curve of `total` is measured, from all to none: every low one, and a spread above."""
    dense = min(total, DENSE)
    spread = {dense + round((total - dense) * i / DENSE) for i in range(DENSE + 1)}
    return sorted({*range(dense + 1), *spread}, reverse=True)


def by_threshold(data: CurveData, report: Rounds) -> list[Point]:
    """The masked model at importance thresholds: a slice's mask is g where g is above the threshold, and 0 elsewhere.

    Rank is the mean over real positions of the number of slices above it, summed over matrices. At threshold 0 this
    is the model whose `recon` `spd eval` reports, and its active slices. Thresholds that cut nothing more are left out.
    """
    variants = draw_variants(["recon"], data.blocks, 1, "forward", (0, 0), torch.Generator())
    kl = dict.fromkeys(THRESHOLDS, 0.0)
    active = {threshold: dict.fromkeys(data.names, 0) for threshold in THRESHOLDS}
    for done, (clean, g) in enumerate(data.importances()):
        report(done, len(data.cleans))
        for threshold in THRESHOLDS:
            cut = {name: torch.where(values > threshold, values, 0.0) for name, values in g.items()}
            kl[threshold] += data.kl_sums(data.decomposition, clean, variants, cut)["recon"]
            for name, values in cut.items():
                active[threshold][name] += int(values[clean.batch.valid].count_nonzero())
    positions = sum(int(clean.batch.valid.sum()) for clean in data.cleans)
    curve: list[Point] = []
    for threshold in THRESHOLDS:
        ranks = {name: count / positions for name, count in active[threshold].items()}
        point = Point(ranks, kl[threshold] / data.looked_at, threshold)
        if not curve or point.rank < curve[-1].rank:
            curve.append(point)
    return curve
