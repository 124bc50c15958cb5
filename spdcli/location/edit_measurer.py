"""Edits measured on one answer, on the run's other prompts, and, where it is worth it, on the facts a model knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spdcli.edits.answer_changes import measure_columns, measure_group
from spdcli.edits.collateral import relative_change, statistics
from spdcli.edits.prompts_and_answers import Questions, join, question_groups
from spdcli.edits.suppression import Edit
from spdcli.edits.text_changes import TextChange, TextToKeep, text_changes
from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.target import Target
from spdcli.progress import Report, counted, silent
from spdcli.records import ABSENT, Absent

FACT_TOKENS = 256  # of one group of facts: an edit that is beyond the limit is given up between groups
KEPT_TOKENS = 4096  # of facts whose hidden states are kept


@dataclass(frozen=True, kw_only=True)
class AnswerEffect:
    """What an edit does to one answer and to the run's other prompts.

    `before` and `after` are P(answer), `ratio` is after / before and `fall` its logarithm, `kl` is KL(before ‖ after)
    of the whole distribution in nats, `rank_after` counts from 1. `others` has |after / before − 1| of each other
    prompt's answer.
    """

    before: float
    after: float
    ratio: float
    kl: float
    rank_after: int
    fall: float
    others: list[float]


@dataclass(frozen=True, kw_only=True)
class SideEffects:
    """How far an edit moves what should stay: `facts` has the statistics of |after / before − 1| over the known facts,
    None without facts; `collateral` is None where there is nothing that should stay; `text` is what becomes of a text,
    ABSENT where none was named."""

    facts: dict[str, float] | None
    collateral: float | None
    text: TextChange | Absent = ABSENT


class EditMeasurer:
    """Measures edits of `target` on the one `question` and on what should stay as it is: `others` and known `facts`.

    Collateral is a `statistic` of relative changes, the larger of that over the other prompts and that over the facts;
    it may be at most `limit`, or anything where that is None. `text` is measured beside. `report` hears how far it is.
    """

    def __init__(
        self,
        target: Target,
        question: Questions,
        others: Questions | None,
        facts: Questions | None,
        statistic: str,
        limit: float | None,
        text: TextToKeep | None = None,
        report: Report = silent,
    ) -> None:
        self.target, self.facts, self.statistic, self.limit = target, facts, statistic, limit
        self.prompts = question if others is None else join([question, others])
        self.edits: dict[str, Edit] = {}
        self.text, self.report = text, report
        self.kept: list[Clean] = []

    def effects(self, edits: Mapping[str, Edit]) -> dict[str, AnswerEffect]:
        """What every edit does to the answer and to the other prompts. The edits are remembered by their names."""
        self.edits |= edits
        return {
            name: AnswerEffect(
                before=columns.before[0].item(),
                after=columns.after[0].item(),
                ratio=columns.ratio[0].item(),
                kl=columns.kl[0].item(),
                rank_after=int(columns.rank_after[0]),
                fall=columns.ratio[0].log().item(),
                others=relative_change(columns.ratio[1:]).tolist(),
            )
            for name, columns in measure_columns(self.target, self.prompts, edits, self.report).items()
        }

    def within(self, changes: Sequence[float] | Tensor) -> bool:
        """Whether what should stay moves within the limit; nothing to stay always does."""
        return self.limit is None or (self.size(changes) or 0.0) <= self.limit

    def size(self, changes: Sequence[float] | Tensor) -> float | None:
        """The statistic of collateral over some changes; None over none."""
        known = torch.as_tensor(changes, dtype=torch.float64)
        return statistics(known)[self.statistic].item() if len(known) else None

    def side_effects(self, effects: Mapping[str, AnswerEffect], count: int) -> dict[str, SideEffects]:
        """The side effects of the first `count` edits within the limit, in the order of `effects`, by name.

        With a limit, edits that do not lower the answer are passed over. Facts are measured for as many edits as it
        takes to find `count`.
        """
        fitting = [
            name
            for name, effect in effects.items()
            if self.within(effect.others) and (self.limit is None or effect.fall < 0)
        ]
        within: dict[str, SideEffects] = {}
        for start in range(0, len(fitting), count):
            for name, changes in self._fact_changes(fitting[start : start + count]).items():
                if self.within(changes) and len(within) < count:
                    apart = [self.size(effects[name].others), self.size(changes)]
                    collateral = max((size for size in apart if size is not None), default=None)
                    within[name] = SideEffects(facts=summary(changes), collateral=collateral)
            if len(within) == count:
                break
        if self.text is None or not within:
            return within
        edits = {name: self.edits[name] for name in within}
        on_text = text_changes(self.target, edits, self.text.parts(self.report))
        return {name: replace(side, text=on_text[name]) for name, side in within.items()}

    def _fact_changes(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The facts' changes by edit; an edit that cannot be within the limit is given up as soon as that is sure."""
        changes: dict[str, Tensor] = {name: torch.zeros(0, dtype=torch.float64) for name in names}
        if self.facts is None:
            return changes
        for clean in self._fact_passes():
            measured = measure_group(self.target, clean, {name: self.edits[name] for name in changes})
            for name, columns in measured.items():
                changes[name] = torch.cat([changes[name], relative_change(columns.ratio).cpu()])
            changes = {name: seen for name, seen in changes.items() if self.within(self._at_least(seen))}
            if not changes:
                break
        return changes

    def _at_least(self, seen: Tensor) -> Tensor:
        """The facts' changes if those not measured yet did not move: no statistic of them can turn out lower."""
        assert self.facts is not None
        return torch.cat([seen, seen.new_zeros(len(self.facts.texts) - len(seen))])

    def _fact_passes(self) -> Iterator[Clean]:
        """The facts' clean passes; kept between calls unless they are many."""
        assert self.facts is not None
        groups = list(question_groups(self.facts.batch, FACT_TOKENS))
        keeps = int(self.facts.batch.valid.sum()) <= KEPT_TOKENS
        for number, (_, batch) in enumerate(counted(groups, "facts beside edits", self.report)):
            clean = self.kept[number] if number < len(self.kept) else clean_pass(self.target, batch, ())
            if keeps and number == len(self.kept):
                self.kept.append(clean)
            yield clean


def summary(changes: Tensor) -> dict[str, float] | None:
    """The statistics of the known facts' relative changes; None where there are none."""
    return {name: value.item() for name, value in statistics(changes).items()} if len(changes) else None
