"""What a decomposition's reconstruction is worth as evidence: from importance masks to masks that were sought.

    importance, stochastic     the losses recon and stochastic_recon, on all matrices together
    corner_0, _half, _1        importance masks, the delta's mask 0, ½ or 1 at every position and matrix at once
    all_on_0, all_on_half      every slice on, the delta's mask 0 or ½ (with 1 it is the target itself)
    pgd_...                    masks in [g, 1] of the largest KL that a search found (`attacks.py`)

The delta is W - U V, also where a decomposition does not count it as a component. Grades are `tables.GRADES`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, masked_logits
from spdcli.engine.losses import divergence
from spdcli.engine.masks import held_masks
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import log_probabilities
from spdcli.measures.answers import answer_rows
from spdcli.measures.attacks import Attack, Budget, attack
from spdcli.measures.evaluation_data import with_importances
from spdcli.measures.evidence_choices import CORNERS, CURVE, FEW, REACH, SEQUENCES, SIZE, STEPS, MaskSearch
from spdcli.measures.mean import Mean
from spdcli.progress import Report, silent
from spdcli.records import ABSENT, Absent, spread
from spdcli.runs.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """KL(target ‖ variant) in nats, a mean over the positions that count, by where masks come from, the weakest
    evidence first.

    `kl` by name: importance, stochastic and the corners; each has its `standard_error` and a grade in `grades`
    (`spdcli.engine.tables.GRADES`). `accuracy` is the share of sequences whose answer is still told right, `answers`
    the probability of every prompt's answer, of a language model. The rest are searches, and say what they were
    allowed: `pgd_shared` with masks that all sequences and positions share, `pgd_shared_delta_off` the same without
    the delta, `pgd_by_position` with others at every position; `pgd_curve` is `pgd_shared` with more and smaller steps.
    """

    kl: Mapping[str, float] = field(metadata=spread("{}"))
    standard_error: Mapping[str, float]
    accuracy: Mapping[str, float]
    answers: Mapping[str, Sequence[float]] | Absent = ABSENT
    grades: Mapping[str, str]
    pgd_shared: Attack | Absent = ABSENT
    pgd_shared_delta_off: Attack | Absent = ABSENT
    pgd_by_position: Attack | Absent = ABSENT
    pgd_curve: Sequence[Attack] | Absent = ABSENT

    @property
    def worst_corner(self) -> float:
        """The largest KL of a corner."""
        return max(self.kl[name] for name in CORNERS)

    @property
    def attacks(self) -> dict[str, Attack]:
        """The searches that were done, by name; a point of the curve as `pgd_curve_320`."""
        searches = {name: getattr(self, name) for name in ("pgd_shared", "pgd_shared_delta_off", "pgd_by_position")}
        points = {f"pgd_curve_{point.steps}": point for point in self.pgd_curve or ()}
        return {name: found for name, found in (searches | points).items() if found}


@dataclass
class CornerSums:
    """Means over batches of every corner's KL and accuracy; and the answers' probabilities of a language model."""

    subject: Subject
    decomposition: Decomposition
    kl: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    right: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    answers: dict[str, list[float]] = field(default_factory=dict)

    def add(self, clean: Clean, g: Mapping[str, Tensor]) -> None:
        """One batch with its importances g `[B, T, C]`."""
        looked, answers, rows = clean.batch.looked, clean.batch.answers, answer_rows(self.subject, clean.batch)
        assert answers is not None
        on = {name: torch.ones_like(values) for name, values in g.items()}
        for name, corner in CORNERS.items():
            masks = held_masks(on if corner.on else g, corner.delta)
            logits = masked_logits(self.subject.target, self.decomposition, clean, masks)
            log_q = log_probabilities(logits)
            each = torch.zeros(looked.shape, device=looked.device)
            each[looked] = divergence(clean.log_probs, log_q).float()
            self.kl[name].add(each.sum(1) / looked.sum(1).clamp(min=1), looked.sum(1))
            self.right[name].add(log_q[rows].argmax(-1).eq(answers).float())
            if self.subject.toy is None:
                self.answers.setdefault(name, []).extend(log_q[rows, answers].exp().tolist())

    def evidence(self, losses: Mapping[str, Mean], searches: Mapping[str, Attack | Sequence[Attack]]) -> Evidence:
        """With the means of the reconstruction `losses` by name, and what searches found, by their field."""
        weak = {"importance": losses["recon"], "stochastic": losses["stochastic_recon"]}
        means = weak | {name: self.kl[name] for name in CORNERS}
        right = {name: mean.value for name, mean in self.right.items()}
        grades = {name: name for name in weak} | dict.fromkeys(CORNERS, "corner")
        return Evidence(
            kl={name: mean.value for name, mean in means.items()},
            standard_error={name: mean.error for name, mean in means.items()},
            accuracy={"importance": right["corner_0"]} | right,
            answers={"importance": self.answers["corner_0"]} | self.answers if self.answers else ABSENT,
            grades=grades | dict.fromkeys(searches, "adversarial"),
            **searches,  # type: ignore[arg-type]
        )


def search_masks(
    subject: Subject,
    decomposition: Decomposition,
    adversary: MaskSearch,
    sequences: int,
    seed: int,
    report: Report = silent,
) -> dict[str, Attack | Sequence[Attack]]:
    """What `adversary` finds, by the fields of `Evidence`.

    A language model is attacked on its prompts, the toy on SEQUENCES fresh sequences, or `sequences` if that is fewer.
    """
    if adversary.kind == "none":
        return {}
    clean, g = next(iter(with_importances(subject, decomposition, min(sequences, SEQUENCES), seed)))
    rows = answer_rows(subject, clean.batch)

    def found(budget: Budget) -> Attack:
        return attack(subject.target, decomposition, clean, g, rows, budget, seed, report=report)

    few = min(FEW, adversary.starts)
    attacks: dict[str, Attack | Sequence[Attack]] = {
        "pgd_shared": found(Budget(STEPS, SIZE, adversary.starts)),
        "pgd_shared_delta_off": found(Budget(STEPS, SIZE, few, delta=False)),
    }
    if adversary.kind == "curve":
        attacks["pgd_by_position"] = found(Budget(STEPS, SIZE, few, shared=False))
        attacks["pgd_curve"] = [found(Budget(steps, REACH / steps, few)) for steps in CURVE]
    return attacks
