"""Questions: prompts and what follows them, one token or several; made, grouped, picked, joined.

B questions, T positions, n looked-at positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spdcli.edits.answer_text import with_answer
from spdcli.engine.target import Batch
from spdcli.errors import SpdError, UsageError
from spdcli.runs.subject import Subject, require_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spdcli.targets.prompts import Prompts

GROUP_TOKENS = 1024  # that one clean pass keeps the hidden states of
GROUP_PADDING = 1  # tokens that a question of a group may be shorter than its longest


@dataclass(frozen=True, eq=False)
class Questions:
    """Sequences and their answers: `batch` looks at the position before every token of an answer.

    `batch.answers` `[B]` is an answer's last token, which is not fed; those before it are. `texts` and `tokens` (the
    answers) are for people; `group` says what they are asked for: prompt or fact.
    """

    batch: Batch
    texts: list[str]
    tokens: list[str]
    group: str = "prompt"


def own_questions(subject: Subject, sequences: int, seed: int) -> Questions:
    """The run's own prompts; for the toy `sequences` fresh sequences, whose answer is m."""
    require_tokens(subject)
    if subject.prompts is not None:
        return _language_questions(subject, subject.prompts)
    generator = torch.Generator().manual_seed(seed)
    return _toy_questions(subject, _toy(subject).shape.sequences.draw(sequences, generator))


def given_questions(subject: Subject, prompts: Sequence[str], answers: Sequence[str] = ()) -> Questions:
    """Texts of the user's own. The last token of a text is its answer, and is not fed; unless `answers` has them, one a
    prompt, of one or several tokens.

    They begin as the run's own prompts do, with or without a begin-of-sequence token. For the toy a text is a sequence
    such as `3 s 17 4 s`, fed whole; its answer m follows the first s.
    """
    require_tokens(subject)
    if subject.prompts is not None:
        own, last = subject.prompts, [None] * len(prompts)
        return text_questions(own.tokenizer, prompts, answers or last, own.begin_token, subject.target.device)
    if answers:
        raise UsageError("the toy's prompts have their answer in them", "leave --answer out")
    rows = [_toy(subject).shape.sequences.prompt(text) for text in prompts]
    if len({len(row) for row in rows}) > 1:
        raise UsageError("the toy's prompts must be of one length")
    if len(rows[0]) > subject.length:
        raise UsageError(f"{len(rows[0])} tokens, but the toy takes {subject.length}", "give a shorter prompt")
    tokens = torch.tensor(rows)
    follow = torch.tensor([_follows_s(row, text, subject) for row, text in zip(rows, prompts, strict=True)])
    looked = torch.zeros_like(tokens, dtype=torch.bool)
    looked[:, -1] = True
    return _toy_questions(subject, Batch(tokens, torch.ones_like(looked), looked, follow))


def _toy(subject: Subject) -> Any:
    assert subject.toy is not None
    return subject.toy


def _follows_s(row: list[int], text: str, subject: Subject) -> int:
    s = _toy(subject).shape.vocabulary
    if row[-1] != s or row.index(s) >= len(row) - 2 or row.count(s) > 2:
        raise UsageError(f"the prompt {text!r} has no answer", "the toy's prompts are like '3 s 17 4 s': m is 17")
    return row[row.index(s) + 1]


def _language_questions(subject: Subject, prompts: Prompts) -> Questions:
    return prompt_questions(prompts, subject.target.device)


def prompt_questions(prompts: Prompts, device: torch.device) -> Questions:
    """Prompts of a language model as questions about their last token."""
    batch = prompts.batch.to(device)
    at = prompts.answer_at.to(batch.tokens.device)
    looked = torch.arange(batch.tokens.shape[1], device=at.device) == at[:, None]
    return Questions(replace(batch, looked=looked), prompts.texts, prompts.answer_texts)


def text_questions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str | None],
    begin_token: bool,
    device: torch.device,
    group: str = "prompt",
) -> Questions:
    """Prompts as questions about the answers beside them, of any number of tokens; None is a prompt's last token.

    Prompt and answer are tokenised as one text; the answer is what follows the tokens that this has in common with the
    prompt alone. SpdError for a prompt without a token before its answer, or that is longer than the model takes.
    """
    from spdcli.targets.prompts import encode, span_text, token_ids

    whole = [with_answer(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    encoded = encode(tokenizer, whole, "held_out", begin_token)
    starts = encoded.answer_at + 1  # of a last token
    tokens = list(encoded.answer_texts)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if answer is None:
            continue
        together = token_ids(tokenizer, whole[row], begin_token)
        alone = token_ids(tokenizer, prompt, begin_token, least=1)
        same = [one == other for one, other in zip(together, alone, strict=False)]
        start = same.index(False) if False in same else len(same)
        if not 0 < start < len(together):
            raise SpdError(f"the prompt {prompt!r} has no token of its own before the answer {answer!r}")
        starts[row] = start
        tokens[row] = span_text(tokenizer, together[start:])
    places = torch.arange(encoded.batch.tokens.shape[1])
    looked = encoded.batch.valid & (places >= starts[:, None] - 1)
    return Questions(replace(encoded.batch, looked=looked).to(device), list(prompts), tokens, group)


def answer_tokens(batch: Batch) -> Tensor:
    """The token that an answer has after every looked-at position, `[n]` in their order."""
    assert batch.answers is not None
    places = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    last = (batch.looked * places).amax(1, keepdim=True)
    follows = batch.tokens.roll(-1, dims=1).scatter(1, last, batch.answers[:, None])
    return follows[batch.looked]


def _toy_questions(subject: Subject, batch: Batch) -> Questions:
    texts = [" ".join(subject.token_text(token) for token in row) for row in batch.tokens.tolist()]
    assert batch.answers is not None
    tokens = [subject.token_text(token) for token in batch.answers.tolist()]
    return Questions(batch.to(subject.target.device), texts, tokens)


def question_groups(batch: Batch, tokens: int = GROUP_TOKENS) -> Iterator[tuple[Tensor, Batch]]:
    """The questions of a batch, shortest first, in groups of at most `tokens` fed tokens (or of one question).

    Yields the rows of a group and their batch, padded to its own longest, by GROUP_PADDING tokens at most.
    """
    lengths = batch.valid.sum(1)
    order = lengths.argsort(stable=True)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and lengths[order[stop]] <= lengths[order[start]] + GROUP_PADDING:
            if (stop + 1 - start) * int(lengths[order[stop]]) > tokens:
                break
            stop += 1
        rows = order[start:stop]
        yield rows, _cut(batch.select(rows), int(lengths[rows].max()))
        start = stop


def _cut(batch: Batch, length: int) -> Batch:
    """The first `length` positions of a batch."""
    return batch.map(lambda tensor: tensor[:, :length] if tensor.dim() > 1 else tensor)


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
        numbers = subject.toy.shape.sequences.read(query)
        if len(numbers) != 1:
            raise UsageError(f"{query!r} is no single token")
        return numbers[0]
    spellings = [query] if query.startswith(" ") else [f" {query}", query]
    for spelling in spellings:
        tokens = _tokens(subject.prompts.tokenizer, spelling)
        if len(tokens) == 1:
            return tokens[0]
    parts = " + ".join(repr(subject.token_text(token)) for token in _tokens(subject.prompts.tokenizer, spellings[0]))
    raise UsageError(f"{query!r} is no single token, but {parts or 'nothing'}", "give one token, or its id as in #42")


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    from spdcli.targets.prompts import plain_ids, require_embedded, require_unicode

    require_unicode(text, "the token")
    tokens = plain_ids(tokenizer, text)
    require_embedded(tokenizer, tokens, f"the token {text!r}")
    return tokens
