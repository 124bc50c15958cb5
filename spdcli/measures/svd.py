"""How small a model says the same: a run's slices beside greedy SVD pruning (Figure 2, Algorithm 2), `spd svd`.

Every method gives a curve, from everything kept to nothing: how much of the decomposed matrices is left, and the mean
KL(target ‖ what is left) over the looked-at positions of data that is drawn once and is the same for all. What rank
is to each, `svd_methods.py` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import UsageError
from spdcli.measures.greedy_svd import greedy, plain_set, weighted_set
from spdcli.measures.rank_curves import (
    CurveData,
    Point,
    Rounds,
    by_kept_and_masked,
    by_mean_importance,
    by_threshold,
    curve_data,
    within,
)
from spdcli.measures.svd_methods import METHODS
from spdcli.progress import Progress, Report, silent
from spdcli.records import ABSENT, Absent
from spdcli.runs.subject import Subject


@dataclass(frozen=True)
class CurvePoint:
    """One model of a curve: its `rank`, its mean `kl` in nats, and the importance `threshold` that cut it, if any."""

    rank: float
    kl: float
    threshold: float | Absent = ABSENT


@dataclass(frozen=True)
class Remainder:
    """What a method has left at the tolerance: `ranks` by matrix, their sum, and the mean `kl` in nats.

    `threshold` is the importance above which slices are kept, of the method that has one.
    """

    ranks: Mapping[str, float]
    total_rank: float
    kl: float
    threshold: float | Absent = ABSENT


@dataclass(frozen=True)
class RankCurves:
    """`spd.svd/1`: KL against rank by method, over `looked_at` predictions.

    `curves[method]` goes from everything kept to nothing. `result[method]` is where Algorithm 2 would stop at
    `tolerance` (nats), None where even the whole of a run's slices exceeds it. `legend[method]` says what rank is.
    Of a target that gives vectors there is `output_loss` mse: a squared error stands in the place of every KL.
    """

    tolerance: float
    looked_at: int
    legend: Mapping[str, str]
    curves: Mapping[str, Sequence[CurvePoint]]
    result: Mapping[str, Remainder | None]
    output_loss: str | Absent = ABSENT

    @property
    def measure(self) -> str:
        """What is told of every model, in words."""
        return "squared error" if self.output_loss else "KL"


def svd_curves(
    subject: Subject,
    decomposition: Decomposition,
    methods: Sequence[str] = tuple(METHODS),
    tolerance: float = 1e-3,
    sequences: int = 512,
    step: int | None = None,
    seed: int = 0,
    report: Report = silent,
) -> RankCurves:
    """Everything `spd svd` reports, on `sequences` fresh sequences of the toy or on a language model's prompts.

    `step` singular values go in a round of the greedy methods (1 is Algorithm 2; None makes about 128 rounds).
    """
    return compare_methods(curve_data(subject, decomposition, sequences, seed), methods, tolerance, step, report)


@torch.no_grad()
def compare_methods(
    data: CurveData,
    methods: Sequence[str],
    tolerance: float,
    step: int | None = None,
    report: Report = silent,
) -> RankCurves:
    """The curves of `methods` on `data`, and what each has left at `tolerance` (nats).

    `report` hears of the rounds of every method. UsageError for a method that is none of METHODS.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise UsageError(f"no method is called {unknown[0]!r}", f"the methods are {', '.join(METHODS)}")
    points = {method: CURVES[method](data, step, rounds_of(method, report)) for method in methods}
    stops = {method: within(curve, tolerance) for method, curve in points.items()}
    return RankCurves(
        tolerance=tolerance,
        looked_at=data.looked_at,
        legend={method: METHODS[method].legend for method in methods},
        curves={
            method: [CurvePoint(point.rank, point.kl, _threshold(point)) for point in curve]
            for method, curve in points.items()
        },
        result={
            method: None if stop is None else Remainder(dict(stop.ranks), stop.rank, stop.kl, _threshold(stop))
            for method, stop in stops.items()
        },
        output_loss=ABSENT if data.target.output_loss == "kl" else data.target.output_loss,
    )


def rounds_of(method: str, report: Report) -> Rounds:
    """Tells `report` of the rounds of one method, under its legend."""
    return lambda done, total: report(Progress(METHODS[method].legend, done, total))


def _threshold(point: Point) -> float | Absent:
    return ABSENT if point.threshold is None else point.threshold


CURVES: dict[str, Callable[[CurveData, int | None, Rounds], list[Point]]] = {
    "greedy_svd": lambda data, step, report: greedy(data, plain_set(data), step, report),
    "weighted_svd": lambda data, step, report: greedy(data, weighted_set(data), step, report),
    "spd": lambda data, step, report: by_mean_importance(data),
    "spd_masked": lambda data, step, report: by_kept_and_masked(data, report),
    "spd_per_position": lambda data, step, report: by_threshold(data, report),
}
