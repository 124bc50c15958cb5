"""Table 1 of the paper with the mechanism of section 6.1: its numbers, what must hold, and what a run says to it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CLASSES = ("s1", "m", "s2", "random")

# Average active slices a position (s1, m, s2, random), unique slices.
PAPER_ACTIVE = {
    "Q0": (0.000, 1.000, 0.000, 0.001, 1),
    "K0": (1.000, 0.050, 0.000, 0.183, 1),
    "V0": (1.000, 0.000, 0.000, 0.000, 1),
    "Q1": (0.000, 0.000, 1.000, 0.000, 1),
    "K1": (0.000, 1.000, 0.000, 0.000, 1),
    "V1": (0.000, 5.053, 0.000, 0.000, 11),
}
PAPER_METRICS = {"faithfulness": 3e-9, "recon": 1e-4, "recon_layerwise": 1e-4}
PAPER_ATTENTION = (0.385, 0.002)
PAPER_ATTENTION_MEAN = 0.194
PAPER_M_TO_S1, PAPER_M_TO_S1_UNPLACED = 1.0, 0.0941

OWN_CLASS = {"Q0": "m", "K0": "s1", "V0": "s1", "Q1": "s2", "K1": "m"}  # where one slice is to be active; V1 has more
MAJORITY = 0.8  # share of seeds that must meet every bound: 4 of 5


@dataclass(frozen=True)
class Bound:
    """`low <= value <= high`; `stated` when a reproduction fails without it, else it only says what agreeing means.

    `strict` excludes `high` itself; `words` say the bound where numbers would not say it as well.
    """

    low: float | None
    high: float | None
    stated: bool
    strict: bool = False
    words: str = ""

    def holds(self, value: float) -> bool:
        """NaN holds no bound."""
        above = self.low is None or value >= self.low
        below = self.high is None or (value < self.high if self.strict else value <= self.high)
        return value == value and above and below

    def __str__(self) -> str:
        if self.words:
            return self.words
        if self.low is not None and self.high is not None:
            return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"
        if self.high is not None:
            return f"{'<' if self.strict else '≤'} {self.high:g}"
        return f"≥ {self.low:g}"


@dataclass(frozen=True)
class Claim:
    """One number of the paper: how to find ours in what `spd eval` reports, and what must hold of it."""

    name: str
    find: Callable[[Mapping[str, Any]], float]
    paper: float | None
    bound: Bound


def near(value: float, tolerance: float) -> Bound:
    """Agreement of a number that no bound is stated for: within `tolerance` of the paper's."""
    return Bound(value - tolerance, value + tolerance, stated=False, words=f"within {tolerance:g}")


def claims() -> list[Claim]:
    """Every number of Table 1, then the masked model's accuracy and the mechanism."""
    return [*_active_claims(), *_unique_claims(), *_metric_claims(), *_attention_claims()]


def _active_claims() -> list[Claim]:
    made = []
    for matrix, values in PAPER_ACTIVE.items():
        for kind, paper in zip(CLASSES, values, strict=False):
            if kind == "random":
                bound = Bound(None, 0.05, stated=True, strict=True)
            elif OWN_CLASS.get(matrix) == kind:
                bound = Bound(0.9, 1.1, stated=True)
            elif (matrix, kind) == ("V1", "m"):
                bound = Bound(None, 8, stated=True)
            else:
                bound = near(paper, 0.1)
            made.append(Claim(f"active {matrix} at {kind}", _found("active", matrix, kind), paper, bound))
    return made


def _unique_claims() -> list[Claim]:
    bounds = {matrix: Bound(1, 1, stated=True) for matrix in PAPER_ACTIVE} | {"V1": Bound(None, 11, stated=True)}
    return [
        Claim(f"unique {matrix}", _found("unique", matrix), values[-1], bounds[matrix])
        for matrix, values in PAPER_ACTIVE.items()
    ]


def _metric_claims() -> list[Claim]:
    largest = {"faithfulness": 1e-7, "recon": 1e-3, "recon_layerwise": 1e-3}
    return [
        Claim(name, _found("metrics", name), PAPER_METRICS[name], Bound(None, bound, stated=True))
        for name, bound in largest.items()
    ]


def _attention_claims() -> list[Claim]:
    no_worse = lambda paper: Bound(None, 2 * paper, stated=False)  # noqa: E731
    layers = [
        Claim(f"attention KL, layer {layer + 1}", _found("attention_kl", layer), paper, no_worse(paper))
        for layer, paper in enumerate(PAPER_ATTENTION)
    ]
    mean = Claim(
        "attention KL, mean",
        lambda data: statistics.mean(data["attention_kl"]),
        PAPER_ATTENTION_MEAN,
        no_worse(PAPER_ATTENTION_MEAN),
    )
    seen = ("circuit", "attention", "target")
    return [
        *layers,
        mean,
        Claim("accuracy, masked model", _found("accuracy", "masked"), None, Bound(0.999, None, stated=True)),
        Claim("attention m to s1", _found(*seen, "m_to_s1"), PAPER_M_TO_S1, near(PAPER_M_TO_S1, 0.1)),
        Claim(
            "attention m to s1, query unplaced",
            _found(*seen, "m_to_s1_unplaced_query"),
            PAPER_M_TO_S1_UNPLACED,
            near(PAPER_M_TO_S1_UNPLACED, 0.1),
        ),
    ]


def _found(*path: str | int) -> Callable[[Mapping[str, Any]], float]:
    def find(data: Mapping[str, Any]) -> float:
        value: Any = data
        for part in path:
            value = value[part]
        return value

    return find


def compare(
    evaluations: Sequence[Mapping[str, Any]], wanted: Sequence[Claim] | None = None
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Ours beside the paper's over one or more seeds: the rows of `spd.reproduce/1`, and each seed's broken bounds.

    `wanted` are the claims to check, those of Table 1 if not given.
    `ours` is the mean over seeds; `spread` its standard deviation, least and largest value (of more than one seed);
    `share` the seeds on which the row's bound holds; `bound` is the stated one or None, `agreement` the tolerance that
    stands in where none is stated. `agrees` when at least MAJORITY of the seeds hold it.
    """
    rows, broken = [], [[] for _ in evaluations]  # type: tuple[list, list[list[str]]]
    for claim in claims() if wanted is None else wanted:
        values = [float(claim.find(evaluation)) for evaluation in evaluations]
        held = [claim.bound.holds(value) for value in values]
        for failures, holds in zip(broken, held, strict=True):
            if claim.bound.stated and not holds:
                failures.append(claim.name)
        share = sum(held) / len(held)
        row = {
            "name": claim.name,
            "ours": statistics.fmean(values),
            "paper": claim.paper,
            "bound": str(claim.bound) if claim.bound.stated else None,
            "agreement": None if claim.bound.stated else str(claim.bound),
            "agrees": share >= MAJORITY,
            "share": share,
        }
        if len(values) > 1:
            std = statistics.stdev(values) if all(value == value for value in values) else math.nan
            row["spread"] = {"std": std, "min": min(values), "max": max(values)}
        rows.append(row)
    return rows, broken


def passes(broken: Sequence[Sequence[str]]) -> bool:
    """Whether enough seeds (MAJORITY) meet every stated bound."""
    return sum(not failures for failures in broken) >= MAJORITY * len(broken)
