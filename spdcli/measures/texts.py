"""Texts to look at a decomposition on: a run's own, or the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from spdcli.engine.target import Batch
from spdcli.errors import UsageError
from spdcli.runs.subject import Subject
from spdcli.targets.sparse_features import find_feature, read_features, single_features, written_features

if TYPE_CHECKING:
    from spdcli.targets.prompts import Prompts

TOY_SEQUENCES = 4


@dataclass(frozen=True, eq=False)
class Texts:
    """Sequences to look at: `batch`, and for people the text and the tokens of each; `find` finds a token's places.

    `numbers` are those that people call them by; from 1, in their order, if None.
    """

    batch: Batch
    texts: list[str]
    pieces: list[list[str]]
    find: Callable[[str], list[tuple[int, int]]]
    numbers: Sequence[int] | None = None

    def number(self, row: int) -> int:
        """What people call the sequence of a row."""
        return row + 1 if self.numbers is None else self.numbers[row]


def own_texts(subject: Subject, seed: int) -> Texts:
    """The prompts a language model was decomposed on, a few seeded sequences of the toy, or every feature alone."""
    if subject.prompts is not None:
        return _language_texts(subject.prompts)
    if subject.feature_toy is not None:
        return _feature_texts(single_features(subject.feature_toy.features))
    assert subject.toy is not None
    generator = torch.Generator().manual_seed(seed)
    return _toy_texts(subject, subject.toy.shape.sequences.draw(TOY_SEQUENCES, generator))


def user_texts(subject: Subject, prompts: Sequence[str], begin_token: bool) -> Texts:
    """Texts of the user's own, fed whole. For the toy a text is its tokens, as in `3 s 17 4 s`; for a feature toy the
    features that are on, as in `3 7:0.5`.

    Raises UsageError for a text of a toy that it cannot take.
    """
    if subject.prompts is not None:
        from spdcli.targets.prompts import encode

        return _language_texts(encode(subject.prompts.tokenizer, list(prompts), "fed", begin_token))
    if subject.feature_toy is not None:
        inputs = [read_features(text, subject.feature_toy.features) for text in prompts]
        return _feature_texts(Batch.everywhere(torch.stack(inputs)[:, None]))
    assert subject.toy is not None
    rows = [subject.toy.shape.sequences.prompt(text) for text in prompts]
    if len({len(row) for row in rows}) > 1:
        raise UsageError("the toy's prompts must be of one length")
    refuse_too_long(subject, len(rows[0]))
    return _toy_texts(subject, Batch.everywhere(torch.tensor(rows)))


def chosen_texts(subject: Subject, own: Texts, prompts: Sequence[int | str], begin_token: bool) -> Texts:
    """Prompts as `--prompt` names them: those of the run's `own` by number, from 1, or texts of the user's own.

    UsageError for a number that no prompt has, and for numbers beside texts: the former are fed as the run feeds them,
    maybe without their answers, the latter whole.
    """
    numbers = [prompt for prompt in prompts if isinstance(prompt, int)]
    if not numbers:
        return user_texts(subject, [str(prompt) for prompt in prompts], begin_token)
    if len(numbers) < len(prompts):
        raise UsageError("prompts of the run and other texts are not looked at together", "give one or the other")
    rows = [find_prompt(own.texts, number) for number in numbers]
    if subject.prompts is not None:
        chosen = _language_texts(subject.prompts.select(rows))
    else:
        batch = own.batch.select(torch.tensor(rows))
        chosen = _feature_texts(batch) if subject.feature_toy is not None else _toy_texts(subject, batch)
    return replace(chosen, numbers=numbers)


def find_prompt(texts: Sequence[str], prompt: int | str) -> int:
    """The row of a prompt by its number, from 1, or its text; UsageError for one that is not there."""
    if isinstance(prompt, int):
        if 1 <= prompt <= len(texts):
            return prompt - 1
        raise UsageError(f"prompt {prompt}: expected one of the run's prompts, 1 to {len(texts)}")
    if prompt in texts:
        return list(texts).index(prompt)
    numbered = ", ".join(f"{number} {text!r}" for number, text in enumerate(texts, start=1))
    raise UsageError(f"{prompt!r} is none of the run's prompts", f"they are {numbered}")


def own_row(texts: Sequence[str], prompt: int | str) -> int | None:
    """The row of a prompt among a run's own `texts`; None for another text, UsageError for a number that is none."""
    return find_prompt(texts, prompt) if isinstance(prompt, int) or prompt in texts else None


def prompt_texts(own: Sequence[str], prompts: Sequence[int | str]) -> list[str]:
    """The texts of prompts: a number, from 1, is one of the run's `own`; UsageError for a number that is none."""
    return [prompt if isinstance(prompt, str) else own[find_prompt(own, prompt)] for prompt in prompts]


def refuse_too_long(subject: Subject, tokens: int) -> None:
    """UsageError for a sequence that is longer than the toy's encodings."""
    if subject.toy is not None and tokens > subject.length:
        raise UsageError(f"{tokens} tokens, but the toy takes {subject.length}", "give a shorter prompt")


def _language_texts(prompts: Prompts) -> Texts:
    from spdcli.targets.prompts import find_token

    return Texts(prompts.batch, prompts.texts, prompts.pieces, lambda query: find_token(prompts, query))


def _toy_texts(subject: Subject, batch: Batch) -> Texts:
    pieces = [[subject.token_text(token) for token in row] for row in batch.tokens.tolist()]
    sequences = subject.toy.shape.sequences  # type: ignore[union-attr]
    return Texts(batch, [" ".join(row) for row in pieces], pieces, lambda query: sequences.find(pieces, query))


def _feature_texts(batch: Batch) -> Texts:
    """Inputs of a feature toy, whose only position is named by the features that are on."""
    texts = [written_features(values) for values in batch.tokens[:, 0]]
    return Texts(batch, texts, [[text] for text in texts], lambda query: find_feature(batch.tokens[:, 0], query))
