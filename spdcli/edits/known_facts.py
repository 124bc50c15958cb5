"""Facts that an edit should leave alone, put to a model: which of them it knows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from spdcli.edits.answer_changes import AnswerChange, AnswerChanges, present_answers
from spdcli.edits.answer_text import warn_of_blanks, with_answer
from spdcli.edits.collateral import Collateral, collateral, mark_known
from spdcli.edits.facts_file import Fact, Facts, Known, Related
from spdcli.edits.prompts_and_answers import Questions, pick, text_questions
from spdcli.engine.target import Target
from spdcli.errors import UsageError
from spdcli.progress import Progress, Report, silent
from spdcli.runs.subject import Subject, require_tokens
from spdcli.targets.prompts import plain_ids

if TYPE_CHECKING:
    from spdcli.targets.prompts import Prompts


@dataclass(frozen=True, eq=False)
class OtherFacts:
    """Facts that an edit should leave alone, as questions, and when a model knows one."""

    questions: Questions
    known: Known

    def known_to(self, target: Target, report: Report = silent) -> OtherFacts | None:
        """Those that the target, as it is, knows; None where it knows none."""
        now = present_answers(target, self.questions, report)
        rows = self.known.holds(now.p, now.rank).nonzero()[:, 0].tolist()
        return replace(self, questions=pick(self.questions, rows)) if rows else None

    def marked(self, effects: AnswerChanges) -> list[AnswerChange]:
        """An edit's effects on these facts, with `known` set."""
        return mark_known(effects, self.known)

    def summary(self, effects: AnswerChanges, seed: int) -> Collateral:
        """The `collateral` of an edit's effects on these facts, marked or not."""
        return collateral(self.marked(effects), seed)


@dataclass(frozen=True, eq=False)
class Paraphrases:
    """Prompts that say in other words what other prompts say: `of[i]` is the row of the one that question i is of."""

    questions: Questions
    of: list[int]

    def about(self, effects: AnswerChanges, rows: Collection[int]) -> list[AnswerChange]:
        """Those of the effects on all of them that are on paraphrases of the prompts of `rows`."""
        return [effect for effect, of in zip(effects, self.of, strict=True) if of in rows]


def fact_questions(
    tokenizer: Any, facts: Sequence[Fact | Related], begin_token: bool, device: torch.device
) -> Questions:
    """The facts as questions, group `fact`, in their order; `tokenizer` is the model's."""
    prompts, answers = [fact.prompt for fact in facts], [fact.answer for fact in facts]
    return text_questions(tokenizer, prompts, answers, begin_token, device, "fact")


def facts_beside(subject: Subject, facts: Facts, own: Sequence[str], report: Report = silent) -> OtherFacts | None:
    """The facts that an edit of a run should leave alone: those whose text is none of `own`.

    Facts that are longer than the model takes are left out, with a warning. None when no fact is left; UsageError for
    the toy, which knows none.
    """
    require_tokens(subject)
    if subject.prompts is None:
        raise UsageError("the induction toy knows no facts", "leave --facts out")
    others = facts.without(own)
    fitting = [fact for fact in others if _fits(subject.prompts, fact)]
    if len(fitting) < len(others):
        text = f"{len(others) - len(fitting)} facts are longer than this model takes, and are left out"
        report(Progress(text, warning=True))
    if not fitting:
        return None
    warn_of_blanks([fact.prompt for fact in fitting], [fact.answer for fact in fitting], report)
    tokenizer, begin = subject.prompts.tokenizer, subject.prompts.begin_token
    return OtherFacts(fact_questions(tokenizer, fitting, begin, subject.target.device), facts.known)


def paraphrases_of(subject: Subject, facts: Facts, prompts: Sequence[Collection[str]]) -> Paraphrases | None:
    """The paraphrases that a facts file has of `prompts`, each in every way that it is written, with its answer or
    without, and that the model can take; None where there are none."""
    assert subject.prompts is not None
    own = subject.prompts
    related = [
        (row, one)
        for row, ways in enumerate(prompts)
        for way in dict.fromkeys(ways)
        for one in facts.related_to(way)
        if one.kind == "paraphrase"
    ]
    fitting = [(row, one) for row, one in related if _fits(own, one)]
    if not fitting:
        return None
    entries = [one for _, one in fitting]
    questions = fact_questions(own.tokenizer, entries, own.begin_token, subject.target.device)
    return Paraphrases(questions, [row for row, _ in fitting])


def _fits(prompts: Prompts, fact: Fact | Related) -> bool:
    """Whether a fact is no longer than the model takes."""
    tokens = plain_ids(prompts.tokenizer, with_answer(fact.prompt, fact.answer))
    return len(tokens) + prompts.begin_token <= prompts.tokenizer.model_max_length


def known_facts(subject: Subject, facts: Facts, own: Sequence[str], report: Report = silent) -> OtherFacts | None:
    """Those of `facts_beside` that the unchanged model knows; None where it knows none."""
    beside = facts_beside(subject, facts, own, report)
    return None if beside is None else beside.known_to(subject.target, report)
