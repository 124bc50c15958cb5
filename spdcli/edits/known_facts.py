"""Facts put to a model: which of them it knows, and how far an edit moves those that it should leave alone.

The relative change of a fact is |after / before - 1| of its answer's probability. An edit's *collateral* is the
median, mean and largest relative change over the facts that the unchanged model knows, with percentile intervals of
a bootstrap over those facts. Side effects have heavy tails, so that none of the three says enough alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spdcli.edits.answer_changes import Questions, present_answers, prompt_questions
from spdcli.edits.facts_file import Fact, Facts, Known, Related
from spdcli.engine.target import Target
from spdcli.runs.subject import Subject
from spdcli.targets.prompts import encode

DRAWS = 2000
LEVEL = 0.95
WORST = 3
STATISTICS = ("median", "mean", "max")


@dataclass(frozen=True, eq=False)
class AskedFacts:
    """Facts that an edit should leave alone, as questions, and when a model knows one."""

    questions: Questions
    known: Known

    def summary(self, effects: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
        """The `collateral` of an edit's effects on these facts, which are marked as known or not."""
        mark_known(effects, self.known)
        return collateral(effects, seed)


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


def mark_known(effects: Sequence[dict[str, Any]], known: Known) -> None:
    """Add to every effect whether the unchanged model knows its answer."""
    for effect in effects:
        effect["known"] = effect["before"] > known.probability and effect["rank_before"] <= known.rank


def relative_change(ratio: Tensor) -> Tensor:
    """|after / before - 1| of ratios after / before."""
    return (ratio - 1).abs()


def collateral(effects: Sequence[Mapping[str, Any]], seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """How far the known facts among `effects` moved (shape `facts` of `spd.suppress/1`).

    `known` of `asked` facts count; `median_relative_change`, `mean_…` and `max_…` are over those, `interval` has the
    bootstrap percentile interval `[low, high]` of each at `level`, and `worst` names the facts that moved most. All
    numbers are None where no fact is known.
    """
    facts = [effect for effect in effects if effect["group"] == "fact"]
    known = [effect for effect in facts if effect["known"]]
    changes = relative_change(torch.tensor([effect["ratio"] for effect in known], dtype=torch.float64))
    summary = summarise(changes, seed, draws)
    order = changes.argsort(descending=True, stable=True)[:WORST].tolist()
    keys = ("prompt", "token", "before", "after", "ratio", "kl")
    worst = [{key: known[row][key] for key in keys} for row in order]
    return {"asked": len(facts), "known": len(known), **summary, "worst": worst}


def summarise(changes: Tensor, seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """Median, mean and max of relative changes `[n]` with their bootstrap intervals; None of each where n is 0."""
    if not len(changes):
        return {f"{name}_relative_change": None for name in STATISTICS} | {
            "interval": dict.fromkeys(STATISTICS),
            "level": LEVEL,
        }
    intervals = bootstrap(changes, seed, draws)
    return {f"{name}_relative_change": value.item() for name, value in statistics(changes).items()} | {
        "interval": {name: bounds.tolist() for name, bounds in intervals.items()},
        "level": LEVEL,
    }


def statistics(changes: Tensor) -> dict[str, Tensor]:
    """Median (the mean of the two middle ones), mean and max over the last dimension."""
    return {"median": changes.quantile(0.5, dim=-1), "mean": changes.mean(-1), "max": changes.amax(-1)}


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
