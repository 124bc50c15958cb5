"""The data of an evaluation: fresh sequences of a toy, a language model's prompts, or text that it never trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Batch
from spdcli.progress import Progress, Report, silent
from spdcli.runs.settings import SEQUENCES_AT_ONCE
from spdcli.runs.subject import Subject

if TYPE_CHECKING:
    from spdcli.targets.prompts import Prompts

EVALUATION_SEED = 20_000_003  # its own stream: never the sequences of training
TOKENS = 512  # of a language model, that are measured where nobody says how many sequences
TOKENS_AT_ONCE = 256  # of them
TOKENS_ATTACKED = 32  # of them, on which masks are sought


def measured_prompts(subject: Subject, sequences: int | None, seed: int) -> Prompts:
    """What a language model is measured on: `sequences` of its prompts, drawn by `seed` where it has more, or of its
    held-out text where it has no prompts. If None so many, at least one, that their tokens are about TOKENS; of a
    planted target, which is small, all."""
    own = subject.prompts
    assert own is not None
    length = int(own.batch.valid.sum(1).float().mean())
    count = sequences or max(1, TOKENS // length)
    if subject.held_out_prompts is not None:
        return subject.held_out_prompts(count)
    if count >= len(own.texts) or (subject.planted is not None and not sequences):
        return own
    drawn = torch.randperm(len(own.texts), generator=torch.Generator().manual_seed(EVALUATION_SEED + seed))
    return own.select(sorted(drawn[:count].tolist()))


def in_parts(subject: Subject, prompts: Prompts) -> Iterator[Subject]:
    """`subject` with a part of `prompts` at a time in place of its own, of about TOKENS_AT_ONCE tokens."""
    size = max(1, TOKENS_AT_ONCE // prompts.batch.tokens.shape[1])
    size = len(prompts.texts) if subject.planted is not None else size
    for start in range(0, len(prompts.texts), size):
        rows = range(start, min(start + size, len(prompts.texts)))
        yield replace(subject, prompts=prompts if len(rows) == len(prompts.texts) else prompts.select(rows))


def attacked_prompts(subject: Subject, prompts: Prompts) -> Prompts:
    """The first of `prompts` that have about TOKENS_ATTACKED tokens, at least one, cut to as many; of a planted target
    all."""
    length = prompts.batch.tokens.shape[1]
    if subject.planted is not None or len(prompts.texts) * length <= TOKENS_ATTACKED:
        return prompts
    return prompts.select(range(max(1, TOKENS_ATTACKED // length))).cut(TOKENS_ATTACKED)


def evaluation_batches(subject: Subject, sequences: int, seed: int) -> Iterator[Batch]:
    """A language model's prompts as one batch, or `sequences` fresh ones of a toy in several."""
    if subject.draw is None:
        assert subject.prompts is not None
        yield subject.prompts.batch
        return
    generator = torch.Generator().manual_seed(EVALUATION_SEED + seed)
    for start in range(0, sequences, SEQUENCES_AT_ONCE):
        count = min(SEQUENCES_AT_ONCE, sequences - start)
        yield subject.draw(count, generator).to(subject.target.device)


def with_importances(
    subject: Subject, decomposition: Decomposition, sequences: int, seed: int, report: Report = silent
) -> Iterator[tuple[Clean, dict[str, Tensor]]]:
    """The data batch by batch as the target runs on it, with the importances g `[B, T, C]` of every matrix."""
    done = 0
    for batch in evaluation_batches(subject, sequences, seed):
        report(Progress("sequences", done, sequences))
        done += len(batch.tokens)
        clean = clean_pass(subject.target, batch, decomposition.names)
        g, _ = decomposition.importance(clean.inputs, clean.padding)
        yield clean, g


def looked_numbers(looked: Tensor) -> Tensor:
    """`[B, T]`: the row that each looked-at position has in log-probabilities `[n, N]` of all of them."""
    return looked.flatten().cumsum(0).sub(1).view_as(looked)
