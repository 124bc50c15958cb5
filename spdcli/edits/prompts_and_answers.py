"""Questions put together: picked, joined, and asked about another token than a prompt's own answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from spdcli.edits.answer_changes import Questions
from spdcli.engine.target import Batch
from spdcli.errors import UsageError
from spdcli.runs.subject import Subject
from spdcli.targets.sequences import toy_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pick(questions: Questions, rows: Sequence[int]) -> Questions:
    """Some of the questions, by row."""
    batch = questions.batch.select(torch.tensor(list(rows), dtype=torch.long, device=questions.batch.tokens.device))
    texts, tokens = ([column[row] for row in rows] for column in (questions.texts, questions.tokens))
    return Questions(batch, texts, tokens, questions.group)


def join(parts: Sequence[Questions]) -> Questions:
    """The questions of all parts in one batch, padded to the longest; they are of the first part's group."""
    length = max(part.batch.tokens.shape[1] for part in parts)

    def together(field: str) -> Tensor:
        tensors = [getattr(part.batch, field) for part in parts]
        return torch.cat([F.pad(tensor, (0, length - tensor.shape[1])) for tensor in tensors])

    answers = [part.batch.answers for part in parts]
    known = torch.cat([answer for answer in answers if answer is not None])
    batch = Batch(together("tokens"), together("valid"), together("looked"), known)
    texts = [text for part in parts for text in part.texts]
    tokens = [token for part in parts for token in part.tokens]
    return Questions(batch, texts, tokens, parts[0].group)


def about_token(subject: Subject, questions: Questions, query: str) -> Questions:
    """The same prompts, each asked for the token `query` in the place of its answer.

    `query` is text, with or without the leading space, or an id such as `#39812`; a prompt's own answer is taken
    where it fits. UsageError for text that is no single token.
    """
    assert questions.batch.answers is not None
    answers = questions.batch.answers.clone()
    for row, (own, text) in enumerate(zip(answers.tolist(), questions.tokens, strict=True)):
        answers[row] = own if query in (text, text.removeprefix(" ")) else token_id(subject, query)
    tokens = [subject.token_text(token) for token in answers.tolist()]
    return Questions(replace(questions.batch, answers=answers), questions.texts, tokens, questions.group)


def token_id(subject: Subject, query: str) -> int:
    """The token that `query` names; UsageError where it names none, or several."""
    size = subject.target.unembedding.shape[0]
    if query.startswith("#") and query[1:].isascii() and query[1:].isdigit() and int(query[1:]) < size:
        return int(query[1:])
    if subject.prompts is None:
        assert subject.toy is not None
        found = toy_tokens(query, subject.toy.shape.vocabulary)
        if len(found) != 1:
            raise UsageError(f"{query!r} is no single token")
        return found[0]
    spellings = [query] if query.startswith(" ") else [f" {query}", query]
    for spelling in spellings:
        tokens = _tokens(subject.prompts.tokenizer, spelling)
        if len(tokens) == 1:
            return tokens[0]
    parts = " + ".join(repr(subject.token_text(token)) for token in _tokens(subject.prompts.tokenizer, spellings[0]))
    raise UsageError(f"{query!r} is no single token, but {parts or 'nothing'}", "give one token, or its id as in #42")


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
