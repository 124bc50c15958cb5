"""Whether a reproduction holds: bounds of numbers, what the seeds say to them, and the verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spdcli.errors import SpdError
from spdcli.records import ABSENT, Absent

MAJORITY = 0.8  # share of seeds that must meet every bound: 4 of 5
SCHEMA = "spd.reproduce/1"
REPORT = "reproduce.json"
Evidence = Mapping[str, Any]  # of one seed, as JSON


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


def near(value: float, tolerance: float) -> Bound:
    """Agreement of a number that no bound is stated for: within `tolerance` of the paper's."""
    return Bound(value - tolerance, value + tolerance, stated=False, words=f"within {tolerance:g}")


@dataclass(frozen=True)
class Claim:
    """One number: how to read ours from a seed's evidence, the paper's if it has one, and what must hold of ours.

    `grade` says what it is worth as evidence that slices do what the target does (a key of `engine.tables.GRADES`),
    where it is any.
    """

    name: str
    read: Callable[[Evidence], float]
    paper: float | None
    bound: Bound
    grade: str = ""


@dataclass(frozen=True)
class Spread:
    """Standard deviation, least and largest value over seeds."""

    std: float
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class ClaimRow:
    """A claim over the seeds: a row of `spd.reproduce/1`.

    `ours` is the mean over seeds, with its `spread` where there are several; `share` are the seeds on which the bound
    holds. `bound` is the stated one or None, `agreement` the tolerance that stands in where none is stated. `agrees`
    when at least MAJORITY of the seeds hold it. `grade` is the claim's.
    """

    name: str
    ours: float
    paper: float | None
    bound: str | None
    agreement: str | None
    agrees: bool
    share: float
    grade: str
    spread: Spread | Absent = ABSENT


@dataclass(frozen=True)
class Verdict:
    """What the seeds say: a row a claim, and by seed the names of the stated bounds that it breaks."""

    rows: list[ClaimRow]
    broken: list[list[str]]

    @property
    def passed(self) -> bool:
        """Whether enough seeds (MAJORITY) meet every stated bound."""
        return sum(not names for names in self.broken) >= MAJORITY * len(self.broken)

    def failure(self, hint: str | None = None) -> SpdError | None:
        """The error that ends a reproduction which did not pass."""
        if self.passed:
            return None
        names = [row.name for row in self.rows if row.bound and not row.agrees]
        seeds = f"{sum(not names for names in self.broken)} of {len(self.broken)} seeds meet every stated bound"
        return SpdError(f"{seeds}; broken: {'; '.join(names) or 'no single one on most seeds'}", hint)


def judge(seeds: Sequence[Evidence], claims: Sequence[Claim]) -> Verdict:
    """The verdict on the evidence of one or more seeds."""
    rows, broken = [], [list[str]() for _ in seeds]
    for claim in claims:
        values = [float(claim.read(evidence)) for evidence in seeds]
        holds = [claim.bound.holds(value) for value in values]
        for names, held in zip(broken, holds, strict=True):
            if claim.bound.stated and not held:
                names.append(claim.name)
        rows.append(claim_row(claim, values, sum(holds) / len(holds)))
    return Verdict(rows, broken)


def claim_row(claim: Claim, values: Sequence[float], share: float) -> ClaimRow:
    """The row of one claim from its values on the seeds, a `share` of which hold its bound."""
    spread: Spread | Absent = ABSENT
    if len(values) > 1:
        std = statistics.stdev(values) if all(value == value for value in values) else math.nan
        spread = Spread(std, min(values), max(values))
    return ClaimRow(
        name=claim.name,
        ours=statistics.fmean(values),
        paper=claim.paper,
        bound=str(claim.bound) if claim.bound.stated else None,
        agreement=None if claim.bound.stated else str(claim.bound),
        agrees=share >= MAJORITY,
        share=share,
        grade=claim.grade,
        spread=spread,
    )


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None; None where all are."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
