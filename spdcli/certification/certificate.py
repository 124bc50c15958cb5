"""A certificate: numbers with their budgets, the bounds that a recipe sets them, and whether these hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spdcli.recipe.bounds import BOUNDS, Bounded


class Measured(NamedTuple):
    """A number, and in words what was spent or looked at to get it."""

    value: float
    budget: str


@dataclass(frozen=True, kw_only=True)
class CertificateRow:
    """One number: `value` is None where it was not measured, `bound` (in words) and `passed` where none is set.

    `grade` says what it is worth as evidence (`spdcli.engine.tables.GRADES`), empty where that means nothing; `about`
    what it is; `budget` on what data and with how much search it was found.
    """

    name: str
    value: float | None
    bound: str | None
    passed: bool | None
    budget: str
    grade: str
    about: str


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """`spd.certify/1`: the `rows`, and whether every bound holds. A bound of what was not measured does not."""

    rows: Sequence[CertificateRow]
    passed: bool

    @property
    def failures(self) -> list[CertificateRow]:
        """The rows whose bound does not hold."""
        return [row for row in self.rows if row.passed is False]


def judged(measured: Mapping[str, Measured], bounds: Mapping[str, float]) -> list[CertificateRow]:
    """A row a number, in the order of BOUNDS; parts of a number, `name:part`, come after the whole and have no bound.

    `bounds` are those of a recipe's [certify] by name; what they name and was not `measured` fails.
    """
    rows = []
    for name, row in BOUNDS.items():
        bound = bounds.get(name)
        parts = [part for part in measured if part.partition(":")[0] == name]
        if bound is not None and name not in parts:
            parts.insert(0, name)
        rows += [_row(part, row, measured.get(part), bound if part == name else None) for part in parts]
    return rows


def _row(name: str, row: Bounded, found: Measured | None, bound: float | None) -> CertificateRow:
    passed = None
    if bound is not None:
        passed = found is not None and row.holds(found.value, bound)
    return CertificateRow(
        name=name,
        value=None if found is None else found.value,
        bound=None if bound is None else row.words(bound),
        passed=passed,
        budget="not measured" if found is None else found.budget,
        grade=row.grade,
        about=row.about,
    )
