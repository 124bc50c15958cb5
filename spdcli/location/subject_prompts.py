"""Prompts that are about somebody: which of their tokens name the subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.errors import UsageError
from spdcli.targets.prompts import Prompts, find_spans, listing


@dataclass(frozen=True, eq=False)
class SubjectPrompt:
    """A prompt that is about somebody: `tokens` `[T]` that are fed, the token `answer` that the last of them predicts,
    and the positions of the `subject`, which is what tracing corrupts.

    For people: the `text`, the `answer_text`, and the fed tokens as `pieces` of text.
    """

    tokens: Tensor
    answer: int
    subject: tuple[int, ...]
    text: str
    answer_text: str
    pieces: tuple[str, ...]


def subject_prompts(prompts: Prompts, subjects: Sequence[str], known: Sequence[str] = ()) -> list[SubjectPrompt]:
    """Every prompt with its subject: all occurrences of the first of `subjects`, then of `known`, that it has.

    `prompts` hold their answers out. Raises UsageError for one of `subjects` that is in no prompt, and for a prompt
    without a subject.
    """
    for subject in subjects:
        if not any(subject_positions(prompts, number, subject) for number in range(len(prompts.texts))):
            raise UsageError(f"no prompt has the subject {subject!r} as whole tokens", listing(prompts))
    answers = prompts.batch.answers
    assert answers is not None
    about = []
    for number, text in enumerate(prompts.texts):
        places = [subject_positions(prompts, number, subject) for subject in [*subjects, *known]]
        own = next((positions for positions in places if positions), None)
        if own is None:
            raise UsageError(
                f"which words of {text!r} are its subject?",
                "give them, as in --subject 'Kobe Bryant'; spd report --no-facts needs none",
            )
        fed, pieces = torch.tensor(prompts.fed(number)), tuple(prompts.pieces[number])
        about.append(SubjectPrompt(fed, int(answers[number]), own, text, prompts.answer_texts[number], pieces))
    return about


def subject_positions(prompts: Prompts, number: int, subject: str) -> tuple[int, ...]:
    """The positions of all occurrences of `subject` in one prompt."""
    words = subject.strip()
    spans = find_spans(prompts, number, words) if words else []
    return tuple(sorted({position for span in spans for position in span}))
