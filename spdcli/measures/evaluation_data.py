"""The data of an evaluation: fresh sequences of a toy, never those of training, or a language model's prompts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Batch
from spdcli.runs.subject import Subject

EVALUATION_SEED = 20_000_003  # its own stream: never the sequences of training
SEQUENCES_AT_ONCE = 512


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
    subject: Subject, decomposition: Decomposition, sequences: int, seed: int
) -> Iterator[tuple[Clean, dict[str, Tensor]]]:
    """The data batch by batch as the target runs on it, with the importances g `[B, T, C]` of every matrix."""
    for batch in evaluation_batches(subject, sequences, seed):
        clean = clean_pass(subject.target, batch, decomposition.names)
        g, _ = decomposition.importance(clean.inputs, clean.padding)
        yield clean, g


def looked_numbers(looked: Tensor) -> Tensor:
    """`[B, T]`: the row that each looked-at position has in log-probabilities `[n, N]` of all of them."""
    return looked.flatten().cumsum(0).sub(1).view_as(looked)
