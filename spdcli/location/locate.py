"""Which slices carry a prompt's answer, and nothing else: every candidate suppressed, measured.

Candidates are the slices that are active somewhere in the prompt. Each is suppressed alone in the original weights,
all in one plan, and ranked by how far the answer's probability falls. What else moves is measured on the run's other
prompts for all of them, and on the facts that the model knows for those that are told. *Collateral* is a statistic
(mean, median or max) of the relative changes |after / before - 1|, the larger of that over the run's other prompts and
that over the facts: one other prompt is not lost among a hundred facts.

Two slices can do more together than the sum of their parts: their excess is

    log r(a, b) - log r(a) - log r(b)        with r = after / before of the answer's probability

and a pair is told when it is below 0 (the paper's "obe" and " Bryant").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spdcli.edits.answer_changes import Questions, measure_columns, measure_group, present_answers, question_groups
from spdcli.edits.choices import USUAL_STATISTIC
from spdcli.edits.known_facts import AskedFacts, known_mask, relative_change, statistics
from spdcli.edits.prompts_and_answers import join, pick
from spdcli.edits.selection import Activity, in_order, with_direction, written
from spdcli.edits.suppression import Address, Edit, suppression, suppressions
from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import UsageError
from spdcli.measures.inspection import matching
from spdcli.runs.subject import Subject

FACT_TOKENS = 256  # of one group of facts: an edit that is beyond the limit is given up between groups
KEPT_TOKENS = 4096  # of facts whose hidden states are kept


@dataclass(frozen=True)
class Search:
    """What to look for: patterns of matrices, how many slices and pairs to tell, how many slices to pair, and by
    which statistic collateral counts and may at most be."""

    matrices: tuple[str, ...] = ("*",)
    top: int = 10
    paired: int = 12
    pairs: int = 5
    statistic: str = USUAL_STATISTIC
    limit: float | None = None
    threshold: float = 0.0


def known_questions(subject: Subject, facts: AskedFacts | None) -> Questions | None:
    """The facts that the unchanged model knows; None where there are none."""
    if facts is None:
        return None
    now = present_answers(subject.target, facts.questions)
    rows = known_mask(now["p"], now["rank"], facts.known).nonzero()[:, 0].tolist()
    return pick(facts.questions, rows) if rows else None


def candidates(decomposition: Decomposition, activity: Activity, row: int, search: Search) -> list[Address]:
    """The slices that are active somewhere in text `row` of `activity`, those that write most first."""
    names = matching(list(activity.g), search.matrices)
    found = {name: (activity.g[name][row] > search.threshold).any(0) for name in names}
    positions = range(activity.texts.batch.tokens.shape[1])
    amounts = written(decomposition, activity, row, positions)
    return in_order(with_direction(decomposition, found), [amounts])


def locate(
    subject: Subject,
    decomposition: Decomposition,
    found: Sequence[Address],
    question: Questions,
    others: Questions | None,
    facts: Questions | None,
    search: Search,
) -> dict[str, Any]:
    """The slices among `found` that lower the answer of the one `question` most (shape of `spd.locate/1`).

    `others` are prompts, `facts` known facts, that should stay as they are. With a limit, slices and pairs of more
    collateral are passed over until `top` are found or none is left that lowers the answer; slices that move the other
    prompts too far are not paired. UsageError without a candidate.
    """
    if not found:
        raise UsageError(f"no slice of these matrices is active in {question.texts[0]!r}")
    beside = Beside(subject, question, others, facts, search)
    single = beside.measure(suppressions(subject.target, decomposition, found))
    ordered = sorted(single, key=lambda name: single[name]["after"])
    chosen = beside.told({name: single[name] for name in ordered}, search.top)
    together: dict[str, dict[str, Any]] = {}
    parts = {str(address): address for address in found}
    strongest = [parts[name] for name in ordered if beside.within(single[name]["others"])][: search.paired]
    pairs = {f"{one} {other}": [one, other] for one, other in itertools.combinations(strongest, 2)}
    if pairs:
        edits = {name: suppression(subject.target, decomposition, pair) for name, pair in pairs.items()}
        for name, entry in beside.measure(edits).items():
            apart = sum(single[str(part)]["fall"] for part in pairs[name])
            entry |= {"slices": [str(part) for part in pairs[name]], "excess": entry["fall"] - apart}
            together[name] = entry
    more = sorted((name for name in together if together[name]["excess"] < 0), key=lambda n: together[n]["excess"])
    told = beside.told({name: together[name] for name in more}, search.pairs)
    return {
        "prompt": question.texts[0],
        "token": question.tokens[0],
        "before": next(iter(single.values()))["before"],
        "candidates": len(found),
        "known_facts": len(facts.texts) if facts is not None else 0,
        "statistic": search.statistic,
        "limit": search.limit,
        "slices": [{"slice": name, **entry} for name, entry in chosen.items()],
        "pairs_measured": len(pairs),
        "pairs_above_sum": len(more),
        "pairs": list(told.values()),
    }


class Beside:
    """Measures edits on a question and on what should stay as it is."""

    def __init__(
        self,
        subject: Subject,
        question: Questions,
        others: Questions | None,
        facts: Questions | None,
        search: Search,
    ) -> None:
        self.target, self.facts, self.search = subject.target, facts, search
        self.asked = question if others is None else join([question, others])
        self.edits: dict[str, Edit] = {}
        self.kept: list[Clean] = []

    def measure(self, edits: Mapping[str, Edit]) -> dict[str, dict[str, Any]]:
        """Every edit on the question and the other prompts: probabilities, `fall` log(after / before), changes."""
        self.edits |= edits
        entries = {}
        for name, columns in measure_columns(self.target, self.asked, edits).items():
            first = {key: columns[key][0].item() for key in ("before", "after", "ratio", "kl")}
            changes = relative_change(columns["ratio"][1:])
            entries[name] = {
                **first,
                "rank_after": int(columns["rank_after"][0]),
                "fall": columns["ratio"][0].log().item(),
                "others": changes.tolist(),
            }
        return entries

    def within(self, changes: Sequence[float] | Tensor) -> bool:
        """Whether what should stay moves within the limit; nothing to stay always does."""
        return self.search.limit is None or (self.statistic(changes) or 0.0) <= self.search.limit

    def statistic(self, changes: Sequence[float] | Tensor) -> float | None:
        """The statistic of collateral over some changes; None over none."""
        known = torch.as_tensor(changes, dtype=torch.float64)
        return statistics(known)[self.search.statistic].item() if len(known) else None

    def told(self, entries: Mapping[str, dict[str, Any]], count: int) -> dict[str, dict[str, Any]]:
        """The first `count` of `entries` within the limit, with the facts' changes and the collateral."""
        limited = self.search.limit is not None
        tried = [
            name
            for name, entry in entries.items()
            if self.within(entry["others"]) and not (limited and entry["fall"] >= 0)
        ]
        told: dict[str, dict[str, Any]] = {}
        for start in range(0, len(tried), count):
            for name, changes in self._facts(tried[start : start + count]).items():
                if self.within(changes) and len(told) < count:
                    apart = [self.statistic(entries[name]["others"]), self.statistic(changes)]
                    sizes = [size for size in apart if size is not None]
                    facts = summary(changes) if len(changes) else None
                    told[name] = entries[name] | {"facts": facts, "collateral": max(sizes, default=None)}
            if len(told) == count:
                break
        return told

    def _facts(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The facts' changes by edit; an edit that cannot be within the limit is given up as soon as that is sure."""
        if self.facts is None:
            return {name: torch.zeros(0, dtype=torch.float64) for name in names}
        changes: dict[str, Tensor] = {name: torch.zeros(0, dtype=torch.float64) for name in names}
        for clean in self._fact_groups():
            for name, columns in measure_group(
                self.target, clean, {name: self.edits[name] for name in changes}
            ).items():
                changes[name] = torch.cat([changes[name], relative_change(columns["ratio"]).cpu()])
            changes = {name: seen for name, seen in changes.items() if self.within(self._at_least(seen))}
            if not changes:
                break
        return changes

    def _at_least(self, seen: Tensor) -> Tensor:
        """The facts' changes if those not asked yet did not move: no statistic of them can turn out lower."""
        assert self.facts is not None
        return torch.cat([seen, seen.new_zeros(len(self.facts.texts) - len(seen))])

    def _fact_groups(self) -> Iterable[Clean]:
        """The facts' clean passes; kept between calls unless they are many."""
        assert self.facts is not None
        made = (clean_pass(self.target, batch, ()) for _, batch in question_groups(self.facts.batch, FACT_TOKENS))
        if int(self.facts.batch.valid.sum()) > KEPT_TOKENS:
            return made
        self.kept = self.kept or list(made)
        return self.kept


def summary(changes: Tensor) -> dict[str, float]:
    """Median, mean and max of the known facts' relative changes."""
    return {name: value.item() for name, value in statistics(changes).items()}
