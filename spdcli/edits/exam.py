"""What a changed model is asked, and what it says: the same questions and facts whatever the change was."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spdcli.edits.answer_changes import AnswerChange, AnswerChanges, measure_edits
from spdcli.edits.answer_text import warn_of_blanks, with_answer
from spdcli.edits.collateral import Collateral
from spdcli.edits.counterfact import Record
from spdcli.edits.editing_scores import EditingScores, RecordQuestions, fact_scores, record_questions, record_scores
from spdcli.edits.facts_file import Facts
from spdcli.edits.known_facts import OtherFacts, Paraphrases, facts_beside, paraphrases_of
from spdcli.edits.prompts_and_answers import Questions, given_questions, own_questions, pick
from spdcli.edits.suppression import Edit
from spdcli.edits.text_changes import TextChange, TextToKeep, text_changes
from spdcli.engine.target import Target
from spdcli.measures.texts import own_row, prompt_texts
from spdcli.progress import Report, silent
from spdcli.records import ABSENT, Absent
from spdcli.runs.subject import Subject


@dataclass(frozen=True, eq=False)
class Exam:
    """Questions whose answers may change, and `facts` that should stay as they are; `seed` is of their bootstrap.

    `paraphrases` are those of the questions, and `records` those of a file in CounterFact's format; `chosen` says
    whether the questions were chosen for the edit, and are not the run's own. `text` should stay as it is, too.
    """

    questions: Questions
    facts: OtherFacts | None = None
    seed: int = 0
    paraphrases: Paraphrases | None = None
    records: RecordQuestions | None = None
    chosen: bool = False
    text: TextToKeep | None = None

    def on_text(self, target: Target, edits: Mapping[str, Edit], report: Report = silent) -> dict[str, TextChange]:
        """What each edit, by name, does to the text; nothing where there is none."""
        return {} if self.text is None else text_changes(target, edits, self.text.parts(report))

    def on_facts(
        self, target: Target, edit: Edit, report: Report = silent
    ) -> tuple[list[AnswerChange], Collateral | None]:
        """What an edit does to every fact, and their collateral; nothing and None where there are no facts."""
        if self.facts is None:
            return [], None
        effects = measure_edits(target, self.facts.questions, {"": edit}, report)[""]
        return self.facts.marked(effects), self.facts.summary(effects, self.seed)

    def scores(
        self,
        subject: Subject,
        edit: Edit,
        effects: AnswerChanges,
        of_facts: AnswerChanges,
        edited: Sequence[bool] | None = None,
        report: Report = silent,
    ) -> dict[str, EditingScores]:
        """Efficacy, paraphrase and specificity of an edit with these effects on the questions and on the facts.

        `edited` says which of the questions the edit is about; all of them, where they were chosen for it. Where
        neither is known the facts give no scores.
        """
        scores = {}
        edited = [True] * len(effects) if self.chosen else edited
        if self.facts is not None and edited is not None:
            rows = [row for row, own in enumerate(edited) if own]
            prompts = {effects[row].prompt for row in rows}
            again: AnswerChanges = []
            if self.paraphrases is not None:
                measured = measure_edits(subject.target, self.paraphrases.questions, {"": edit}, report)[""]
                again = self.paraphrases.about(measured, rows)
            others = {effect.prompt: effect for effect in [*of_facts, *effects] if effect.prompt not in prompts}
            cut = [effect for effect in effects if effect.prompt in prompts]
            scores["facts"] = fact_scores(cut, again, list(others.values()))
        if self.records is not None:
            scores["counterfact"] = record_scores(subject, self.records, {"": edit}, report)[""]
        return scores


def open_exam(
    subject: Subject,
    prompts: Sequence[int | str] = (),
    facts: Facts | None = None,
    *,
    answers: Sequence[str] = (),
    records: Sequence[Record] = (),
    sequences: int = 16,
    seed: int = 0,
    text: TextToKeep | None = None,
    report: Report = silent,
) -> Exam:
    """The run's own prompts (of the toy `sequences` fresh ones), or `prompts` in their place: one of them by number,
    from 1, or another text; and the `facts` that are none of either. `answers` are those of `prompts`, one each, where
    they are not their last tokens.

    UsageError for a number that no prompt has, and where the toy is to be asked for facts or records; `report` hears
    of facts that are left out, and of prompts that end in a blank.
    """
    questions = own_questions(subject, sequences, seed)
    if prompts:
        rows = [own_row(questions.texts, prompt) for prompt in prompts]
        own_alone = [row for row in rows if row is not None]
        if answers or len(own_alone) < len(rows):
            questions = given_questions(subject, prompt_texts(questions.texts, prompts), answers)
        else:
            questions = pick(questions, own_alone)
    warn_of_blanks(questions.texts, answers, report)
    own = subject.prompts.texts if subject.prompts is not None else []
    whole = [with_answer(text, answer) for text, answer in itertools.zip_longest(questions.texts, answers)]
    beside = None if facts is None else facts_beside(subject, facts, [*own, *questions.texts, *whole], report)
    return Exam(
        questions,
        beside,
        seed,
        None if facts is None else paraphrases_of(subject, facts, list(zip(questions.texts, whole, strict=True))),
        record_questions(subject, records) if records else None,
        chosen=bool(prompts),
        text=text,
    )


def script_exam(
    subject: Subject,
    questions: Questions,
    facts: Facts | None,
    records: Sequence[Record] = (),
    seed: int = 0,
    text: TextToKeep | None = None,
    report: Report = silent,
) -> Exam:
    """What the edits of a script are asked: its `questions`, the run's own prompts first, and all `facts`."""
    own = subject.prompts.texts if subject.prompts is not None else []
    warn_of_blanks(questions.texts, (), report)
    return Exam(
        questions,
        None if facts is None else facts_beside(subject, facts, (), report),
        seed,
        None if facts is None else paraphrases_of(subject, facts, [[text] for text in own]),
        record_questions(subject, records) if records else None,
        text=text,
    )


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
    every fact; `alone` those of each part of it by its name, where it has several; `facts` sums the facts up. `scores`
    are efficacy, paraphrase and specificity by where they come from, `facts` or `counterfact`, and `text` is what
    becomes of a text; of an edit of weights alone.
    """

    slices: list[str]
    effects: AnswerChanges
    alone: Mapping[str, AnswerChanges]
    facts: Collateral | None
    expectations: Sequence[Expectation] = ()
    scores: Mapping[str, EditingScores] | Absent = ABSENT
    text: TextChange | Absent = ABSENT
