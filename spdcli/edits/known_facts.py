"""Facts that an edit should leave alone, put to a model: which of them it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from spdcli.edits.answer_changes import AnswerChange, AnswerChanges, present_answers
from spdcli.edits.collateral import Collateral, collateral, mark_known
from spdcli.edits.facts_file import Fact, Facts, Known, Related
from spdcli.edits.prompts_and_answers import Questions, pick, prompt_questions
from spdcli.engine.target import Target
from spdcli.errors import UsageError
from spdcli.progress import Progress, Report, silent
from spdcli.runs.subject import Subject, require_tokens
from spdcli.targets.prompts import encode, plain_ids


@dataclass(frozen=True, eq=False)
class OtherFacts:
    """Facts that an edit should leave alone, as questions, and when a model knows one."""

    questions: Questions
    known: Known

    def known_to(self, target: Target) -> OtherFacts | None:
        """Those that the target, as it is, knows; None where it knows none."""
        now = present_answers(target, self.questions)
        rows = self.known.holds(now.p, now.rank).nonzero()[:, 0].tolist()
        return replace(self, questions=pick(self.questions, rows)) if rows else None

    def marked(self, effects: AnswerChanges) -> list[AnswerChange]:
        """An edit's effects on these facts, with `known` set."""
        return mark_known(effects, self.known)

    def summary(self, effects: AnswerChanges, seed: int) -> Collateral:
        """The `collateral` of an edit's effects on these facts, marked or not."""
        return collateral(self.marked(effects), seed)


def fact_questions(
    tokenizer: Any, facts: Sequence[Fact | Related], begin_token: bool, device: torch.device
) -> Questions:
    """The facts as questions, group `fact`, in their order; `tokenizer` is the model's."""
    prompts = encode(tokenizer, [fact.prompt for fact in facts], "held_out", begin_token)
    return prompt_questions(prompts, device, "fact")


def facts_beside(subject: Subject, facts: Facts, own: Sequence[str], report: Report = silent) -> OtherFacts | None:
    """The facts that an edit of a run should leave alone: those whose text is none of `own`.

    Facts that are longer than the model takes are left out, with a warning. None when no fact is left; UsageError for
    the toy, which knows none.
    """
    require_tokens(subject)
    if subject.prompts is None:
        raise UsageError("the induction toy knows no facts", "leave --facts out")
    tokenizer, begin = subject.prompts.tokenizer, subject.prompts.begin_token
    others = facts.without(own)
    limit = tokenizer.model_max_length - begin
    fitting = [fact for fact in others if len(plain_ids(tokenizer, fact.prompt)) <= limit]
    if len(fitting) < len(others):
        text = f"{len(others) - len(fitting)} facts are longer than this model takes, and are left out"
        report(Progress(text, warning=True))
    if not fitting:
        return None
    return OtherFacts(fact_questions(tokenizer, fitting, begin, subject.target.device), facts.known)


def known_facts(subject: Subject, facts: Facts, own: Sequence[str], report: Report = silent) -> OtherFacts | None:
    """Those of `facts_beside` that the unchanged model knows; None where it knows none."""
    beside = facts_beside(subject, facts, own, report)
    return None if beside is None else beside.known_to(subject.target)
