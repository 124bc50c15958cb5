"""What a change of a model does to its answers: probability, rank and KL of what follows, a prompt at a time.

An answer of several tokens has the product of their probabilities, each given those before it. B questions, n answer
tokens of all of them, N vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from spdcli.edits.prompts_and_answers import Questions, answer_tokens, question_groups
from spdcli.edits.suppression import Address, Edit, by_matrix, edit_variants
from spdcli.engine.forward import Clean, clean_pass, plan_pass
from spdcli.engine.masks import chunk_masks
from spdcli.engine.reconstruction import row_costs
from spdcli.engine.subcomponents import Decomposition, SliceSet
from spdcli.engine.target import Target
from spdcli.engine.variants import Variant, chunks
from spdcli.errors import UsageError
from spdcli.measures.importances import importances_of
from spdcli.progress import Progress, Report, silent
from spdcli.records import ABSENT, Absent
from spdcli.runs.subject import Subject

PLAN_BYTES = 2**30  # of which little is held at once, since nothing is kept for backward here; more gains nothing


@dataclass(frozen=True, kw_only=True)
class AnswerChange:
    """What becomes of one answer: an entry of `effects` in `spd.suppress/1`.

    `before` and `after` are probabilities of the answer `token` of `prompt`, and `ratio` is after / before; ranks count
    from 1, the likeliest token; `kl` is KL(before ‖ after) of the whole next-token distribution after the prompt, in
    nats. Of an answer of several tokens the probability is their joint one and the rank the worst of theirs, so that it
    is 1 where greedy decoding gives the answer. `group` is prompt or fact.

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


@torch.no_grad()
def predictions(
    target: Target, slices: SliceSet, clean: Clean, variants: Sequence[Variant]
) -> Iterator[tuple[str, slice, Tensor]]:
    """Next-token log-probabilities of every fixed variant, each row at its looked-at places.

    Yields a variant's name, some of its questions and their `[n, N]`, in the order of the plan: a variant
    may come in parts. One plan for all: no model is copied, no variant is run before its first changed block, and no
    more than a chunk of distributions is held at once.
    """
    sequences, positions = clean.batch.tokens.shape
    ordered = sorted(variants, key=lambda variant: variant.entry)
    for chunk in chunks(ordered, sequences, row_costs(target, slices, positions), PLAN_BYTES):
        hidden = plan_pass(target, slices, clean, chunk, chunk_masks(chunk, slices, {}))
        for piece, rows in zip(chunk, hidden.split([len(piece) for piece in chunk]), strict=True):
            own = slice(piece.start, piece.stop)
            yield piece.variant.loss, own, target.log_probabilities(rows[clean.batch.looked[own]])


class AnswerColumns(NamedTuple):
    """The numbers of `AnswerChange` for n answers, `[n]` each."""

    before: Tensor
    after: Tensor
    ratio: Tensor
    rank_before: Tensor
    rank_after: Tensor
    kl: Tensor


def answer_columns(
    answers: Tensor, before: Tensor, after: Tensor, lengths: Sequence[int] | None = None
) -> AnswerColumns:
    """What becomes of answers between the log-probabilities `before` and `after` `[n, N]` of their tokens `[n]`.

    `lengths` says how many tokens each of the B answers has; None is one each.
    """
    before, after = before.double(), after.double()
    first, then = before.gather(1, answers[:, None])[:, 0], after.gather(1, answers[:, None])[:, 0]
    ranks = [(log_p > own[:, None]).sum(1) + 1 for log_p, own in ((before, first), (after, then))]
    starts: Tensor | slice = slice(None)
    if lengths is not None and max(lengths) > 1:
        sizes = torch.tensor(lengths, device=answers.device)
        starts = sizes.cumsum(0) - sizes
        first, then = joint(first, sizes), joint(then, sizes)
        ranks = [torch.segment_reduce(rank.double(), "max", lengths=sizes).long() for rank in ranks]
    return AnswerColumns(
        before=first.exp(),
        after=then.exp(),
        ratio=(then - first).exp(),
        rank_before=ranks[0],
        rank_after=ranks[1],
        kl=divergence(before[starts], after[starts]),
    )


def joint(log_p: Tensor, lengths: Tensor) -> Tensor:
    """The log-probabilities `[B]` of answers, of those of their tokens `[n]`; they have `lengths` `[B]` tokens."""
    return torch.segment_reduce(log_p, "sum", lengths=lengths)


def changes_of(questions: Questions, columns: AnswerColumns) -> list[AnswerChange]:
    """The change of every question's answer."""
    numbers = zip(*(column.tolist() for column in columns), strict=True)
    return [
        AnswerChange(
            group=questions.group, prompt=text, token=token, **dict(zip(AnswerColumns._fields, row, strict=True))
        )
        for text, token, row in zip(questions.texts, questions.tokens, numbers, strict=True)
    ]


def compare_answers(questions: Questions, before: Tensor, after: Tensor) -> list[AnswerChange]:
    """The change of every answer between log-probabilities `before` and `after` `[n, N]` at the looked-at positions."""
    batch = questions.batch
    return changes_of(questions, answer_columns(answer_tokens(batch), before, after, batch.looked.sum(1).tolist()))


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) `[n]` in nats of log-probabilities `[n, N]`; rounding below 0 is 0."""
    return (before.exp() * (before - after)).nan_to_num(0.0).sum(1).clamp(min=0)


def measure_edits(
    target: Target, questions: Questions, edits: Mapping[str, Edit], report: Report = silent
) -> dict[str, list[AnswerChange]]:
    """What every edit, by name, does to every answer, all in one plan on the unchanged model."""
    measured = measure_columns(target, questions, edits, report)
    return {name: changes_of(questions, columns) for name, columns in measured.items()}


def measure_columns(
    target: Target, questions: Questions, edits: Mapping[str, Edit], report: Report = silent
) -> dict[str, AnswerColumns]:
    """The same as columns `[B]`. Questions of different lengths are asked in groups, so that memory does not grow with
    their number; `report` hears how many answers, one an edit and question, are there."""
    order: list[Tensor] = []
    groups: list[dict[str, AnswerColumns]] = []
    done, total = 0, len(edits) * len(questions.texts)

    def count(answers: int) -> None:
        nonlocal done
        done += answers
        report(Progress(f"answers of {questions.group}s", done, total))

    count(0)
    for rows, batch in question_groups(questions.batch):
        order.append(rows)
        groups.append(measure_group(target, clean_pass(target, batch, ()), edits, count))
    back = torch.cat(order).argsort()
    return {
        name: AnswerColumns(*(column[back] for column in joined([group[name] for group in groups]))) for name in edits
    }


@torch.no_grad()
def measure_group(
    target: Target, clean: Clean, edits: Mapping[str, Edit], count: Callable[[int], None] = lambda answers: None
) -> dict[str, AnswerColumns]:
    """What every edit, by name, does to the answers of one clean pass, all in one plan; `count` is told of answers that
    are there."""
    slices, variants = edit_variants(target, edits)
    answers, firsts = answer_tokens(clean.batch), clean.at.firsts
    parts: dict[str, list[tuple[int, AnswerColumns]]] = {name: [] for name in edits}
    for name, own, after in predictions(target, slices, clean, variants):
        spots = slice(firsts[own.start], firsts[own.stop])
        lengths = [firsts[row + 1] - firsts[row] for row in range(own.start, own.stop)]
        parts[name].append((own.start, answer_columns(answers[spots], clean.log_probs[spots], after, lengths)))
        count(len(lengths))
    in_order = {name: sorted(own, key=lambda part: part[0]) for name, own in parts.items()}
    return {name: joined([columns for _, columns in own]) for name, own in in_order.items()}


def joined(parts: Sequence[AnswerColumns]) -> AnswerColumns:
    """The columns of all parts, one below the other."""
    return AnswerColumns(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class PresentAnswers(NamedTuple):
    """Probability `p` and rank of every answer in the model as it is, each `[B]`; ranks count from 1."""

    p: Tensor
    rank: Tensor


@torch.no_grad()
def present_answers(target: Target, questions: Questions, report: Report = silent) -> PresentAnswers:
    """What the target, as it is, gives every answer."""
    p = torch.zeros(len(questions.texts), dtype=torch.float64, device=target.device)
    rank = torch.zeros(len(questions.texts), dtype=torch.long, device=target.device)
    done = 0
    for rows, batch in question_groups(questions.batch):
        report(Progress(f"{questions.group}s that it knows", done, len(questions.texts)))
        done += len(rows)
        log_p = clean_pass(target, batch, ()).log_probs
        now = answer_columns(answer_tokens(batch), log_p, log_p, batch.looked.sum(1).tolist())
        p[rows], rank[rows] = now.before, now.rank_before
    return PresentAnswers(p, rank)


def active_on(
    subject: Subject, decomposition: Decomposition, questions: Questions, addresses: Sequence[Address]
) -> list[list[str]]:
    """Which of the slices are active (importance above 0) somewhere in each question: its *own* slices."""
    g, _ = importances_of(subject, decomposition, questions.batch)
    own: list[list[str]] = [[] for _ in questions.texts]
    for name, index in by_matrix(addresses).items():
        somewhere = (g[name][:, :, index] > 0).any(1)  # [B, r]
        for row, column in somewhere.nonzero().tolist():
            own[row].append(str(Address(name, index[column])))
    return own


def with_active(
    subject: Subject,
    decomposition: Decomposition,
    questions: Questions,
    addresses: Sequence[Address],
    effects: AnswerChanges,
) -> list[AnswerChange]:
    """The effects on `questions` with `active` set, see `active_on`; None for text too long for the gates."""
    try:
        own: Sequence[list[str] | None] = active_on(subject, decomposition, questions, addresses)
    except UsageError:
        own = [None] * len(effects)
    return [replace(effect, active=active) for effect, active in zip(effects, own, strict=True)]
