"""Does another run of the same target have the same slices? Mean largest cosine of U and of V, as VPD tells it.

For every active slice of a run, the largest |cos| of its direction with one of another run's active slices of the same
matrix; the mean over all active slices of all matrices that both runs decompose. 1 is the same directions again; the
best of n random directions in d dimensions has about sqrt(2 ln(n) / d). Active is what is active anywhere on the data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import UsageError
from spdcli.measures.evaluation_data import with_importances
from spdcli.runs.loading import LoadedRun
from spdcli.runs.subject import Subject


class Matched(NamedTuple):
    """The mean largest |cos| of U and of V, over so many `slices`."""

    U: float
    V: float
    slices: int


@torch.no_grad()
def matched(run: LoadedRun, other: LoadedRun, sequences: int, threshold: float, seed: int) -> Matched:
    """How well the active slices of `run` are found again in `other`; on `sequences` sequences where data are drawn.

    UsageError where the two take different targets apart: directions have no common basis then.
    """
    shared = [name for name in run.decomposition.names if name in other.decomposition.names]
    if not shared or not all(_same_weight(run, other, name) for name in shared):
        raise UsageError(
            f"{other} takes another target apart than {run}",
            "--against needs a run of the same target: --seed N --set target.path=RUN makes one of a toy",
        )
    ours = active_slices(run.subject, run.decomposition, sequences, threshold, seed)
    theirs = active_slices(other.subject, other.decomposition, sequences, threshold, seed)
    best: dict[str, list[Tensor]] = {"U": [], "V": []}
    for name in shared:
        one, two = run.decomposition.of(name), other.decomposition.of(name)
        best["U"].append(largest_cosines(one.U.t()[ours[name]], two.U.t()[theirs[name]]))
        best["V"].append(largest_cosines(one.V[ours[name]], two.V[theirs[name]]))
    means = {letter: torch.cat(values).mean().item() for letter, values in best.items()}
    return Matched(means["U"], means["V"], sum(len(values) for values in best["U"]))


def largest_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Of each of `first` `[n, d]` the largest |cos| with one of `second` `[m, d]`, `[n]`; 0 where there is none."""
    if not len(second):
        return torch.zeros(len(first), dtype=torch.float64)
    cosines = F.normalize(first.double(), dim=1) @ F.normalize(second.double(), dim=1).t()
    return cosines.abs().amax(1).cpu()


def active_slices(
    subject: Subject, decomposition: Decomposition, sequences: int, threshold: float, seed: int
) -> dict[str, Tensor]:
    """`[C]` bool by matrix: which slices have an importance above `threshold` at some real position."""
    found: dict[str, Tensor] = {}
    for clean, g in with_importances(subject, decomposition, sequences, seed):
        for name, values in g.items():
            somewhere = (values[clean.batch.valid] > threshold).any(0)
            found[name] = somewhere | found.get(name, torch.zeros_like(somewhere))
    return found


def _same_weight(run: LoadedRun, other: LoadedRun, name: str) -> bool:
    one, two = (each.subject.target.matrices[name].weight for each in (run, other))
    return one.shape == two.shape and torch.equal(one.cpu(), two.cpu())
