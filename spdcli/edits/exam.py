"""What a changed model is asked, and what it says: the same questions and facts whatever the change was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spdcli.edits.answer_changes import AnswerChange, AnswerChanges, measure_edits
from spdcli.edits.collateral import Collateral
from spdcli.edits.facts_file import Facts
from spdcli.edits.known_facts import OtherFacts, facts_beside
from spdcli.edits.prompts_and_answers import Questions, given_questions, own_questions
from spdcli.edits.suppression import Edit
from spdcli.engine.target import Target
from spdcli.progress import Report, silent
from spdcli.runs.subject import Subject


@dataclass(frozen=True, eq=False)
class Exam:
    """Questions whose answers may change, and `facts` that should stay as they are; `seed` is of their bootstrap."""

    questions: Questions
    facts: OtherFacts | None = None
    seed: int = 0

    def on_facts(self, target: Target, edit: Edit) -> tuple[list[AnswerChange], Collateral | None]:
        """What an edit does to every fact, and their collateral; nothing and None where there are no facts."""
        if self.facts is None:
            return [], None
        effects = measure_edits(target, self.facts.questions, {"": edit})[""]
        return self.facts.marked(effects), self.facts.summary(effects, self.seed)


def open_exam(
    subject: Subject,
    prompts: Sequence[str] = (),
    facts: Facts | None = None,
    *,
    sequences: int = 16,
    seed: int = 0,
    report: Report = silent,
) -> Exam:
    """The run's own prompts (of the toy `sequences` fresh ones), or `prompts` in their place, and the `facts` that are
    none of either.

    UsageError where the toy is to be asked for facts; `report` hears of facts that are left out.
    """
    questions = given_questions(subject, prompts) if prompts else own_questions(subject, sequences, seed)
    own = subject.prompts.texts if subject.prompts is not None else []
    beside = None if facts is None else facts_beside(subject, facts, [*own, *prompts], report)
    return Exam(questions, beside, seed)


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What is expected of an edit, and whether it holds; `passed` and `value` are None before it is measured.

    `bound` is in words, of `at_least` and `at_most`. A value that cannot be measured passes no bound.
    """

    edit: str
    name: str
    passed: bool | None = None
    value: float | None = None
    bound: str
    at_least: float | None
    at_most: float | None


@dataclass(frozen=True, kw_only=True)
class ChangeReport:
    """What a change of a model does (`spd.suppress/1`, but for the name of the run and of what was written).

    `slices` are the addresses of what was cut. `effects` are those of the whole change on every question, then on
    every fact; `alone` those of each part of it by its name, where it has several; `facts` sums the facts up.
    """

    slices: list[str]
    effects: AnswerChanges
    alone: Mapping[str, AnswerChanges]
    facts: Collateral | None
    expectations: Sequence[Expectation] = ()
