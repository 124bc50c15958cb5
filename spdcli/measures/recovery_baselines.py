"""What singular value decompositions find of the planted slices: baselines that know weights, and no importances.

    svd            all singular slices of each matrix
    greedy_svd     those that greedy pruning keeps at a tolerance (Algorithm 2)
    weighted_svd   the same, of each matrix weighted by what it reads

Their slices are on everywhere, so that nothing is said of positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spdcli.engine.subcomponents import Decomposition, SliceSet
from spdcli.measures.greedy_svd import greedy, plain_set, weighted_set
from spdcli.measures.rank_curves import CurveData, curve_data, within
from spdcli.measures.slice_recovery import Recovery, compared, recovery_data
from spdcli.runs.subject import Subject

TOLERANCE = 1e-3  # nats


@torch.no_grad()
def baseline_recoveries(
    subject: Subject, decomposition: Decomposition, sequences: int, seed: int
) -> dict[str, Recovery]:
    """How well each baseline finds the planted slices of the matrices that were decomposed."""
    data = curve_data(subject, decomposition, sequences, seed)
    plain, weighted = plain_set(data), weighted_set(data)
    ranks = {name: plain.of(name).U.shape[1] for name in plain.names}
    factors = recovery_data(subject, decomposition, sequences, 0.0, seed).factors

    def recovery(slices: SliceSet, ranks: Mapping[str, int]) -> Recovery:
        largest = {name: list(range(rank)) for name, rank in ranks.items()}
        return compared(subject, {name: slices.of(name) for name in ranks}, largest, factors)

    return {
        "svd": recovery(plain, ranks),
        "greedy_svd": recovery(plain, _kept(data, plain)),
        "weighted_svd": recovery(weighted, _kept(data, weighted)),
    }


def _kept(data: CurveData, slices: SliceSet) -> dict[str, int]:
    """How many slices of each matrix greedy pruning, one at a time, keeps at TOLERANCE."""
    stop = within(greedy(data, slices, 1, lambda done, total: None), TOLERANCE)
    assert stop is not None, "all of them are the target's own matrices"
    return {name: int(rank) for name, rank in stop.ranks.items()}
