"""What a change of a model does to its answers: probability, rank and KL of the next token, a prompt at a time.

A *question* is a prompt of which one position's next token is the answer. B questions, T positions, N vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spdcli.edits.suppression import Address, Edit, by_matrix, edit_variants
from spdcli.engine.forward import Clean, clean_pass, plan_pass
from spdcli.engine.masks import chunk_masks
from spdcli.engine.step import row_costs
from spdcli.engine.subcomponents import Decomposition, SliceSet
from spdcli.engine.target import Batch, Target
from spdcli.engine.variants import Variant, chunks
from spdcli.errors import UsageError
from spdcli.measures.importances import importances_of
from spdcli.records import ABSENT, Absent
from spdcli.runs.subject import Subject
from spdcli.targets.sequences import induction_batch, toy_tokens

if TYPE_CHECKING:
    from spdcli.targets.prompts import Prompts

PLAN_BYTES = 2**30  # of which little is held at once, since nothing is kept for backward here; more gains nothing
GROUP_TOKENS = 1024  # that one clean pass keeps the hidden states of
GROUP_PADDING = 1  # tokens that a question of a group may be shorter than its longest


@dataclass(frozen=True, eq=False)
class Questions:
    """Sequences and their answers: `batch` looks at one position a sequence, `batch.answers` `[B]` is what follows.

    `texts` and `tokens` (the answers) are for people; `group` says what they are asked for: prompt or fact.
    """

    batch: Batch
    texts: list[str]
    tokens: list[str]
    group: str = "prompt"


@dataclass(frozen=True, kw_only=True)
class AnswerChange:
    """What becomes of one answer: an entry of `effects` in `spd.suppress/1`.

    `before` and `after` are probabilities of the answer `token` of `prompt`, and `ratio` is after / before; ranks count
    from 1, the likeliest token; `kl` is KL(before ‖ after) of the whole next-token distribution, in nats. `group` is
    prompt or fact.

    What does not apply is ABSENT. Of an edit of a script: `edit`, its name. Of an ablation: `target`, the probability
    in the target (`before` is the decomposed model's), and `kl_target`, KL(target ‖ after). `active`: which of the
    slices are active in the prompt; None for text too long for the gates. `known`: whether the unchanged model knows
    the fact.
    """

    edit: str | Absent = ABSENT
    group: str
    prompt: str
    token: str
    before: float
    after: float
    ratio: float
    rank_before: int
    rank_after: int
    kl: float
    target: float | Absent = ABSENT
    kl_target: float | Absent = ABSENT
    active: Sequence[str] | Absent | None = ABSENT
    known: bool | Absent = ABSENT


AnswerChanges = Sequence[AnswerChange]


def own_questions(subject: Subject, sequences: int, seed: int) -> Questions:
    """The run's own prompts; for the toy `sequences` fresh sequences, whose answer is m."""
    if subject.prompts is not None:
        return _language_questions(subject, subject.prompts)
    shape = _toy(subject).shape
    generator = torch.Generator().manual_seed(seed)
    return _toy_questions(subject, induction_batch(sequences, shape.length, shape.vocabulary, generator))


def given_questions(subject: Subject, prompts: Sequence[str], begin_token: bool) -> Questions:
    """Texts of the user's own. The last token of a text is its answer, and is not fed.

    For the toy a text is a sequence such as `3 s 17 4 s`, fed whole; its answer m follows the first s.
    """
    if subject.prompts is not None:
        from spdcli.targets.prompts import encode

        return _language_questions(subject, encode(subject.prompts.tokenizer, list(prompts), "held_out", begin_token))
    rows = [toy_tokens(text, _toy(subject).shape.vocabulary) for text in prompts]
    if len({len(row) for row in rows}) > 1:
        raise UsageError("the toy's prompts must be of one length")
    if len(rows[0]) > subject.length:
        raise UsageError(f"{len(rows[0])} tokens, but the toy takes {subject.length}", "give a shorter prompt")
    tokens = torch.tensor(rows)
    answers = torch.tensor([_follows_s(row, text, subject) for row, text in zip(rows, prompts, strict=True)])
    looked = torch.zeros_like(tokens, dtype=torch.bool)
    looked[:, -1] = True
    return _toy_questions(subject, Batch(tokens, torch.ones_like(looked), looked, answers))


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


def prompt_questions(prompts: Prompts, device: torch.device, group: str = "prompt") -> Questions:
    """Prompts of a language model as questions about their last token."""
    batch = prompts.batch.to(device)
    at = prompts.answer_at.to(batch.tokens.device)
    looked = torch.arange(batch.tokens.shape[1], device=at.device) == at[:, None]
    return Questions(replace(batch, looked=looked), prompts.texts, prompts.answer_texts, group)


def _toy_questions(subject: Subject, batch: Batch) -> Questions:
    texts = [" ".join(subject.token_text(token) for token in row) for row in batch.tokens.tolist()]
    assert batch.answers is not None
    tokens = [subject.token_text(token) for token in batch.answers.tolist()]
    return Questions(batch.to(subject.target.device), texts, tokens)


def log_probabilities(target: Target, hidden: Tensor) -> Tensor:
    """The model's next-token log-probabilities `[n, N]`, float64, from `hidden` `[n, D]` after its last block."""
    logits = F.linear(target.finish(hidden), target.unembedding, target.unembedding_bias)
    return logits.double().log_softmax(-1)


@torch.no_grad()
def predictions(
    target: Target, slices: SliceSet, clean: Clean, variants: Sequence[Variant]
) -> Iterator[tuple[str, slice, Tensor]]:
    """Next-token log-probabilities of every fixed variant, each row at its looked-at place.

    Yields a variant's name, some of its questions and their `[n, N]` in float64, in the order of the plan: a variant
    may come in parts. One plan for all: no model is copied, no variant is run before its first changed block, and no
    more than a chunk of distributions is held at once.
    """
    sequences, positions = clean.batch.tokens.shape
    ordered = sorted(variants, key=lambda variant: variant.entry)
    for chunk in chunks(ordered, sequences, row_costs(target, slices, positions), PLAN_BYTES):
        hidden = plan_pass(target, slices, clean, chunk, chunk_masks(chunk, slices, {}))
        for piece, rows in zip(chunk, hidden.split([len(piece) for piece in chunk]), strict=True):
            own = slice(piece.start, piece.stop)
            yield piece.variant.loss, own, log_probabilities(target, rows[clean.batch.looked[own]])


def answer_columns(answers: Tensor, before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """The numbers of `AnswerChange`, each `[n]`, of answers `[n]` and log-probabilities `before`, `after` `[n, N]`."""
    before, after = before.double(), after.double()
    first, then = before.gather(1, answers[:, None]), after.gather(1, answers[:, None])
    return {
        "before": first.exp()[:, 0],
        "after": then.exp()[:, 0],
        "ratio": (then - first).exp()[:, 0],
        "rank_before": (before > first).sum(1) + 1,
        "rank_after": (after > then).sum(1) + 1,
        "kl": divergence(before, after),
    }


def changes_of(questions: Questions, columns: Mapping[str, Tensor]) -> list[AnswerChange]:
    """The change of every question's answer, from the columns `[B]` of `answer_columns`."""
    values = {name: column.tolist() for name, column in columns.items()}
    return [
        AnswerChange(
            group=questions.group,
            prompt=text,
            token=token,
            **{name: column[row] for name, column in values.items()},
        )
        for row, (text, token) in enumerate(zip(questions.texts, questions.tokens, strict=True))
    ]


def compare_answers(questions: Questions, before: Tensor, after: Tensor) -> list[AnswerChange]:
    """The change of every answer between log-probabilities `before` and `after` `[B, N]`."""
    assert questions.batch.answers is not None
    return changes_of(questions, answer_columns(questions.batch.answers, before, after))


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) `[B]` in nats of log-probabilities `[B, N]`; rounding below 0 is 0."""
    return (before.exp() * (before - after)).nan_to_num(0.0).sum(1).clamp(min=0)


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


def measure_edits(target: Target, questions: Questions, edits: Mapping[str, Edit]) -> dict[str, list[AnswerChange]]:
    """What every edit, by name, does to every answer, all in one plan on the unchanged model."""
    return {name: changes_of(questions, columns) for name, columns in measure_columns(target, questions, edits).items()}


def measure_columns(target: Target, questions: Questions, edits: Mapping[str, Edit]) -> dict[str, dict[str, Tensor]]:
    """`answer_columns` of every edit by name, each column `[B]`.

    Questions of different lengths are asked in groups, so that memory does not grow with their number.
    """
    found: dict[str, dict[str, Tensor]] = {name: {} for name in edits}
    for rows, batch in question_groups(questions.batch):
        for name, columns in measure_group(target, clean_pass(target, batch, ()), edits).items():
            for key, part in columns.items():
                found[name].setdefault(key, part.new_empty(len(questions.texts)))[rows] = part
    return found


@torch.no_grad()
def measure_group(target: Target, clean: Clean, edits: Mapping[str, Edit]) -> dict[str, dict[str, Tensor]]:
    """`answer_columns` of every edit by name on the questions of one clean pass, all in one plan."""
    slices, variants = edit_variants(target, edits)
    answers = clean.batch.answers
    assert answers is not None
    parts: dict[str, list[tuple[int, dict[str, Tensor]]]] = {name: [] for name in edits}
    for name, own, after in predictions(target, slices, clean, variants):
        parts[name].append((own.start, answer_columns(answers[own], clean.log_probs[own], after)))
    joined = {}
    for name, found in parts.items():
        ordered = [columns for _, columns in sorted(found, key=lambda part: part[0])]
        joined[name] = {key: torch.cat([columns[key] for columns in ordered]) for key in ordered[0]}
    return joined


@torch.no_grad()
def present_answers(target: Target, questions: Questions) -> dict[str, Tensor]:
    """Probability and rank of every answer in the model as it is, each `[B]`."""
    p = torch.zeros(len(questions.texts), dtype=torch.float64, device=target.device)
    rank = torch.zeros(len(questions.texts), dtype=torch.long, device=target.device)
    for rows, batch in question_groups(questions.batch):
        assert batch.answers is not None
        log_p = clean_pass(target, batch, ()).log_probs.double()
        own = log_p.gather(1, batch.answers[:, None])
        p[rows], rank[rows] = own.exp()[:, 0], (log_p > own).sum(1) + 1
    return {"p": p, "rank": rank}


def active_on(
    subject: Subject, decomposition: Decomposition, questions: Questions, addresses: Sequence[Address]
) -> list[list[str]]:
    """Which of the slices are active (importance above 0) somewhere in each question: its *own* slices."""
    g, _ = importances_of(subject, decomposition, questions.batch)
    found: list[list[str]] = [[] for _ in questions.texts]
    for name, index in by_matrix(addresses).items():
        somewhere = (g[name][:, :, index] > 0).any(1)  # [B, r]
        for row, column in somewhere.nonzero().tolist():
            found[row].append(str(Address(name, index[column])))
    return found
