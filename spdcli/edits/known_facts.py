"""Facts put to a model: which of them it knows, and how far an edit moves those that it should leave alone.

The relative change of a fact is |after / before - 1| of its answer's probability. An edit's *collateral* is the
median, mean and largest relative change over the facts that the unchanged model knows, with percentile intervals of
a bootstrap over those facts. Side effects have heavy tails, so that none of the three says enough alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spdcli.edits.answer_changes import AnswerChange, AnswerChanges, Questions, present_answers, prompt_questions
from spdcli.edits.choices import STATISTICS
from spdcli.edits.facts_file import Fact, Facts, Known, Related
from spdcli.engine.target import Target
from spdcli.records import ABSENT, Absent, spread
from spdcli.runs.subject import Subject
from spdcli.targets.prompts import encode

DRAWS = 2000
LEVEL = 0.95
WORST = 3


@dataclass(frozen=True, eq=False)
class AskedFacts:
    """Facts that an edit should leave alone, as questions, and when a model knows one."""

    questions: Questions
    known: Known

    def marked(self, effects: AnswerChanges) -> list[AnswerChange]:
        """An edit's effects on these facts, with `known` set."""
        return mark_known(effects, self.known)

    def summary(self, effects: AnswerChanges, seed: int) -> Collateral:
        """The `collateral` of an edit's effects on these facts, marked or not."""
        return collateral(self.marked(effects), seed)


@dataclass(frozen=True, kw_only=True)
class ChangeSizes:
    """How large relative changes |after / before - 1| are.

    `relative_change` by statistic, and `interval`, the bootstrap percentile interval (low, high) of each at `level`;
    None of each where nothing was measured. The last two are ABSENT where no interval was drawn.
    """

    relative_change: Mapping[str, float | None] = field(metadata=spread("{}_relative_change"))
    interval: Mapping[str, tuple[float, float] | None] | Absent = ABSENT
    level: float | Absent = ABSENT


@dataclass(frozen=True, kw_only=True)
class Collateral(ChangeSizes):
    """How far an edit moves the facts that a model knows (`facts` of `spd.suppress/1`).

    The sizes are over the `known` of `asked` facts, and `worst` are the ones that moved most.
    """

    asked: int
    known: int
    worst: AnswerChanges


def fact_questions(
    tokenizer: Any, facts: Sequence[Fact | Related], begin_token: bool, device: torch.device
) -> Questions:
    """The facts as questions, group `fact`, in their order; `tokenizer` is the model's."""
    prompts = encode(tokenizer, [fact.prompt for fact in facts], "held_out", begin_token)
    return prompt_questions(prompts, device, "fact")


def facts_beside(
    subject: Subject, facts: Facts, own: Sequence[str], begin_token: bool
) -> tuple[AskedFacts | None, int]:
    """The facts that an edit of a run should leave alone: those whose text is none of `own`.

    Facts that are longer than the model takes are left out; the second value counts them. None when no fact is left.
    """
    assert subject.prompts is not None
    tokenizer = subject.prompts.tokenizer
    others = facts.without(own)
    limit = tokenizer.model_max_length - begin_token
    fitting = [fact for fact in others if len(tokenizer(fact.prompt, add_special_tokens=False)["input_ids"]) <= limit]
    if not fitting:
        return None, len(others)
    questions = fact_questions(tokenizer, fitting, begin_token, subject.target.device)
    return AskedFacts(questions, facts.known), len(others) - len(fitting)


def known_mask(p: Tensor, rank: Tensor, known: Known) -> Tensor:
    """Which answers of probability `p` `[n]` and rank `rank` `[n]` a model knows, `[n]` bool."""
    return (p > known.probability) & (rank <= known.rank)


def mark_known(effects: AnswerChanges, known: Known) -> list[AnswerChange]:
    """The effects with `known` set: whether the unchanged model knows the answer."""
    return [
        replace(effect, known=effect.before > known.probability and effect.rank_before <= known.rank)
        for effect in effects
    ]


def relative_change(ratio: Tensor) -> Tensor:
    """|after / before - 1| of ratios after / before."""
    return (ratio - 1).abs()


def collateral(effects: AnswerChanges, seed: int = 0, draws: int = DRAWS) -> Collateral:
    """How far those facts among `effects` moved that are marked as known."""
    facts = [effect for effect in effects if effect.group == "fact"]
    known = [effect for effect in facts if effect.known]
    changes = relative_change(torch.tensor([effect.ratio for effect in known], dtype=torch.float64))
    sizes = summarise(changes, seed, draws)
    order = changes.argsort(descending=True, stable=True)[:WORST].tolist()
    return Collateral(
        asked=len(facts),
        known=len(known),
        relative_change=sizes.relative_change,
        interval=sizes.interval,
        level=sizes.level,
        worst=[known[row] for row in order],
    )


def summarise(changes: Tensor, seed: int = 0, draws: int = DRAWS) -> ChangeSizes:
    """The statistics of relative changes `[n]` with their bootstrap intervals; None of each where n is 0."""
    if not len(changes):
        return ChangeSizes(relative_change=dict.fromkeys(STATISTICS), interval=dict.fromkeys(STATISTICS), level=LEVEL)
    intervals = {name: tuple(bounds.tolist()) for name, bounds in bootstrap(changes, seed, draws).items()}
    return ChangeSizes(
        relative_change={name: value.item() for name, value in statistics(changes).items()},
        interval=intervals,
        level=LEVEL,
    )


def statistics(changes: Tensor) -> dict[str, Tensor]:
    """The numbers of `STATISTICS` over the last dimension."""
    return {name: statistic(changes) for name, statistic in STATISTICS.items()}


def bootstrap(changes: Tensor, seed: int, draws: int = DRAWS) -> dict[str, Tensor]:
    """Percentile intervals `[2]` of the statistics of `changes` `[n]`: `draws` times n of them with replacement."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(changes), (draws, len(changes)), generator=generator)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=changes.dtype)
    return {name: values.quantile(tails) for name, values in statistics(changes.cpu()[index]).items()}


def check_facts(
    target: Target, tokenizer: Any, facts: Facts, begin_token: bool, name: str, known: Known
) -> list[dict[str, Any]]:
    """What a model called `name` knows of a facts file, one entry a fact and a related prompt, in the file's order.

    `agrees` says whether the file's note is right; it is None where the file does not speak of this model.
    """
    entries: list[Fact | Related] = [*facts.fact, *facts.related]
    questions = fact_questions(tokenizer, entries, begin_token, target.device)
    found = present_answers(target, questions)
    knows = known_mask(found["p"], found["rank"], known).tolist()
    report = []
    for row, entry in enumerate(entries):
        noted = name in entry.known_by if name in facts.models else None
        report.append(
            {
                "category": entry.category if isinstance(entry, Fact) else entry.kind,
                "prompt": entry.prompt,
                "token": questions.tokens[row],
                "p": found["p"][row].item(),
                "rank": int(found["rank"][row]),
                "known": knows[row],
                "noted": noted,
                "agrees": None if noted is None else noted == knows[row],
            }
        )
    return report


def noted(facts: Facts, report: Sequence[Mapping[str, Any]], name: str) -> Facts:
    """The facts with their notes about the model `name` made anew from `check_facts`."""
    knows = {entry["prompt"]: entry["known"] for entry in report}

    def renewed(entry: Any) -> Any:
        others = [model for model in entry.known_by if model != name]
        return entry.model_copy(update={"known_by": [*others, *[name] * knows[entry.prompt]]})

    return facts.model_copy(
        update={
            "models": [*(model for model in facts.models if model != name), name],
            "fact": [renewed(fact) for fact in facts.fact],
            "related": [renewed(related) for related in facts.related],
        }
    )
