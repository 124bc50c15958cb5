"""The three numbers that papers on editing models report of an edit: efficacy, paraphrase and specificity.

                   of a facts file                                       of CounterFact's records
    efficacy       of the edited prompts: the answer is no longer the    P(new) > P(true) of the rewrite's prompt
                   likeliest token
    paraphrase     the same of their paraphrases                         P(new) > P(true) of the paraphrases
    specificity    of other facts, and of the run's prompts that are     P(true) > P(new) of the neighbourhood, prompts
                   not edited: the answer is still the likeliest         of other subjects

Each is a share of prompts, and `score` is their harmonic mean. Of a facts file those prompts count whose answer was the
likeliest before the edit: only they can lose it. Answers of several tokens count with their joint probability (papers
that take the mean over tokens give long answers more). An edit that only takes a fact away, as suppression does, knows
nothing of a file's new targets: P(new) > P(true) says then how far the truth fell.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from spdcli.edits.answer_changes import AnswerChanges, measure_columns
from spdcli.edits.counterfact import Record
from spdcli.edits.prompts_and_answers import Questions, text_questions
from spdcli.edits.suppression import Edit
from spdcli.errors import UsageError
from spdcli.progress import Report, silent
from spdcli.runs.subject import Subject


@dataclass(frozen=True, kw_only=True)
class PromptShare:
    """The share of so many `prompts` that an edit should change, or should not, `before` and `after` it; None of 0."""

    before: float | None
    after: float | None
    prompts: int


@dataclass(frozen=True, kw_only=True)
class EditingScores:
    """The three numbers of an edit, and `score`, their harmonic mean; None where one of them has no prompts."""

    efficacy: PromptShare
    paraphrase: PromptShare
    specificity: PromptShare
    score: float | None


def scores_of(efficacy: PromptShare, paraphrase: PromptShare, specificity: PromptShare) -> EditingScores:
    """The three with their harmonic mean."""
    shares = [efficacy.after, paraphrase.after, specificity.after]
    measured = [share for share in shares if share is not None]
    score = statistics.harmonic_mean(measured) if len(measured) == len(shares) else None
    return EditingScores(efficacy=efficacy, paraphrase=paraphrase, specificity=specificity, score=score)


def share_of(pairs: Iterable[tuple[bool, bool]]) -> PromptShare:
    """The share of prompts of which something holds before and after, a pair each."""
    held = list(pairs)
    if not held:
        return PromptShare(before=None, after=None, prompts=0)
    before, after = (sum(column) / len(held) for column in zip(*held, strict=True))
    return PromptShare(before=before, after=after, prompts=len(held))


def fact_scores(edited: AnswerChanges, paraphrases: AnswerChanges, others: AnswerChanges) -> EditingScores:
    """The scores by what became of the answers of edited prompts, of their paraphrases, and of all that should stay."""

    def share(effects: AnswerChanges, lost: bool) -> PromptShare:
        known = [effect for effect in effects if effect.rank_before == 1]
        return share_of((not lost, (effect.rank_after > 1) == lost) for effect in known)

    return scores_of(share(edited, True), share(paraphrases, True), share(others, False))


@dataclass(frozen=True, eq=False)
class RecordQuestions:
    """Records as questions: those of the true answers first, then as many of the new ones; `part[i]` says which of the
    three numbers prompt i is of, by its name."""

    questions: Questions
    part: list[str]


def record_questions(subject: Subject, records: Sequence[Record]) -> RecordQuestions:
    """Records put to a language model; UsageError for the toy."""
    if subject.prompts is None:
        raise UsageError("CounterFact is about language models", "leave --counterfact out")
    asked = [
        (part, prompt, record.requested_rewrite)
        for record in records
        for part, prompts in (
            ("efficacy", [record.requested_rewrite.text]),
            ("paraphrase", record.paraphrase_prompts),
            ("specificity", record.neighborhood_prompts),
        )
        for prompt in prompts
    ]
    answers = [rewrite.target_true for *_, rewrite in asked] + [rewrite.target_new for *_, rewrite in asked]
    own = subject.prompts
    prompts = [prompt for _, prompt, _ in asked] * 2
    questions = text_questions(own.tokenizer, prompts, answers, own.begin_token, subject.target.device)
    return RecordQuestions(questions, [part for part, *_ in asked])


def record_scores(
    subject: Subject, asked: RecordQuestions, edits: Mapping[str, Edit], report: Report = silent
) -> dict[str, EditingScores]:
    """The scores of every edit, by name, on the same records, all in one plan on the unchanged model."""
    count = len(asked.part)

    def parts(columns: Sequence[Tensor]) -> EditingScores:
        new = [(p[count:] > p[:count]).tolist() for p in columns]  # P(new) > P(true), before and after
        true = [(p[:count] > p[count:]).tolist() for p in columns]
        rows = {part: [row for row, own in enumerate(asked.part) if own == part] for part in dict.fromkeys(asked.part)}

        def share(part: str, held: Sequence[list[bool]]) -> PromptShare:
            return share_of((held[0][row], held[1][row]) for row in rows.get(part, ()))

        return scores_of(share("efficacy", new), share("paraphrase", new), share("specificity", true))

    measured = measure_columns(subject.target, asked.questions, edits, report)
    return {name: parts([columns.before, columns.after]) for name, columns in measured.items()}
