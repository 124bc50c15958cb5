"""L0: how many slices are active at a position."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spdcli.engine.subcomponents import Decomposition
from spdcli.measures.evaluation_data import with_importances
from spdcli.runs.subject import Subject


@torch.no_grad()
def active_per_position(
    subject: Subject, decomposition: Decomposition, thresholds: Sequence[float], sequences: int, seed: int
) -> list[float]:
    """Slices whose importance is above each of `thresholds`, over all matrices, a mean over real positions of the data:
    a language model's prompts, or `sequences` fresh ones of the toy, by `seed`."""
    counts, positions = [0] * len(thresholds), 0
    for clean, g in with_importances(subject, decomposition, sequences, seed):
        real = clean.batch.valid
        positions += int(real.sum())
        for number, threshold in enumerate(thresholds):
            counts[number] += sum(int((values[real] > threshold).sum()) for values in g.values())
    return [count / positions for count in counts]
