"""Table 1 of a toy: active slices by position class (1a), and how far its attention is from the target's (1c)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, masked_logits
from spdcli.engine.losses import attention_divergence
from spdcli.engine.masks import importance_masks
from spdcli.engine.subcomponents import Decomposition
from spdcli.measures.circuit import Circuit
from spdcli.measures.evaluation_data import looked_numbers, with_importances
from spdcli.measures.evaluation_totals import Evaluation, Sums
from spdcli.measures.evidence import CornerSums, search_masks
from spdcli.measures.evidence_choices import MaskSearch
from spdcli.measures.mean import Mean
from spdcli.measures.target_and_masked import TargetAndMasked, patterns_of
from spdcli.progress import Report, silent
from spdcli.records import ABSENT, Absent
from spdcli.runs.subject import Subject
from spdcli.targets.sequences import POSITION_CLASSES


@dataclass(frozen=True)
class AttentionSplit:
    """The attention KL of one layer, counted from 0: a mean over the queries that the circuit lives by (`matters`),
    and over all others (`rest`), in nats, None where the layer has no such query; and at the `last` query, whose
    prediction is all that a loss on the last token looks at."""

    layer: int
    matters: float | None
    rest: float | None
    last: float


@dataclass(frozen=True, kw_only=True)
class ToyEvaluation(Evaluation):
    """`spd.eval/2` of a toy (Table 1): `active` by matrix and position class is a mean a position (Table 1a).

    `attention_kl` by layer is KL(target ‖ masked) in nats, a mean over sequences, heads and queries (Table 1c), and
    `attention_kl_split` the same by what the circuit needs of the query. `accuracy` is the share of sequences whose
    answer is told right. `circuit` is there for a toy of the paper's kind (section 6.1).
    """

    active: Mapping[str, Mapping[str, float]]
    attention_kl: Sequence[float]
    attention_kl_split: Sequence[AttentionSplit]
    accuracy: TargetAndMasked[float]
    circuit: Circuit | Absent = ABSENT


@dataclass
class ToySums:
    """Sums over batches of what only a toy has: counts by (matrix, class) and by class, and means by layer.

    `right` counts by model the sequences whose last prediction is the answer.
    """

    subject: Subject
    decomposition: Decomposition
    threshold: float
    active: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    positions: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    attention: dict[int, Mean] = field(default_factory=lambda: defaultdict(Mean))
    attention_split: dict[tuple[int, str], Mean] = field(default_factory=lambda: defaultdict(Mean))
    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, clean: Clean, g: Mapping[str, Tensor]) -> None:
        """One batch with its importances g `[B, T, C]`."""
        for kind, mask in clean.batch.classes.items():
            self.positions[kind] += int(mask.sum())
            for name, values in g.items():
                self.active[name, kind] += int((values[mask] > self.threshold).sum())
        self._compare_attention(clean, g)
        self._count_right(clean, g)

    def _compare_attention(self, clean: Clean, g: Mapping[str, Tensor]) -> None:
        """KL of each layer's attention, target against masked model, mean over heads and queries; and by queries."""
        assert self.subject.toy is not None
        patterns = patterns_of(self.subject.target, self.decomposition, clean, g)
        matter = queries_that_matter(len(patterns.target))
        for layer, (log_p, log_q) in enumerate(zip(patterns.target, patterns.masked, strict=True)):
            divergence = attention_divergence(log_p, log_q).mean(1)  # [B, T]
            self.attention[layer].add(divergence.mean(1))
            own = clean.batch.classes[matter[layer]] if layer in matter else torch.zeros_like(clean.batch.valid)
            self.attention_split[layer, "last"].add(divergence[:, -1])
            for name, queries in (("matters", own), ("rest", ~own)):
                if bool(queries.any()):
                    self.attention_split[layer, name].add((divergence * queries).sum(1) / queries.sum(1))

    def _count_right(self, clean: Clean, g: Mapping[str, Tensor]) -> None:
        batch = clean.batch
        assert batch.answers is not None
        masks = importance_masks(g, self.decomposition.delta)
        logits = masked_logits(self.subject.target, self.decomposition, clean, masks)
        last = looked_numbers(batch.looked)[batch.classes["s2"]]
        self.right["target"] += int((clean.log_probs[last].argmax(-1) == batch.answers).sum())
        self.right["masked"] += int((logits[last].argmax(-1) == batch.answers).sum())


def evaluate_toy(
    subject: Subject,
    decomposition: Decomposition,
    sequences: int,
    threshold: float,
    seed: int,
    adversary: MaskSearch,
    report: Report = silent,
) -> ToyEvaluation:
    """A toy on `sequences` fresh sequences, without its circuit."""
    sums = Sums.start(subject.target, decomposition, threshold, seed)
    toy_sums = ToySums(subject, decomposition, threshold)
    corners = CornerSums(subject, decomposition)
    for clean, g in with_importances(subject, decomposition, sequences, seed, report):
        for part in (sums, toy_sums, corners):
            part.add(clean, g)
    found = search_masks(subject, decomposition, adversary, sequences, seed, report)
    split = toy_sums.attention_split
    return ToyEvaluation(
        seed=seed,
        threshold=threshold,
        **sums.totals(),
        evidence=corners.evidence(sums.reconstruction, found),
        active={
            name: {kind: toy_sums.active[name, kind] / toy_sums.positions[kind] for kind in POSITION_CLASSES}
            for name in decomposition.names
        },
        attention_kl=[mean.value for _, mean in sorted(toy_sums.attention.items())],
        attention_kl_split=[
            AttentionSplit(
                layer,
                matters=split[layer, "matters"].value if (layer, "matters") in split else None,
                rest=split[layer, "rest"].value if (layer, "rest") in split else None,
                last=split[layer, "last"].value,
            )
            for layer in sorted(toy_sums.attention)
        ],
        accuracy=TargetAndMasked(toy_sums.right["target"] / sequences, toy_sums.right["masked"] / sequences),
    )


def queries_that_matter(layers: int) -> dict[int, str]:
    """The position class whose attention the induction circuit lives by: m in the first layer, s2 in the last.

    Section 6.1: m must attend to s1, then s2 to m. What other queries attend to changes nothing at the last position,
    so that a decomposition which looks only there is free to give them any pattern.
    """
    return {0: "m", layers - 1: "s2"}
