"""Numbers and bounds: which of them hold, worked out by hand."""

from __future__ import annotations

import math

import pytest

from spdcli.certification.certificate import Certificate, Measured, judged
from spdcli.engine.tables import GRADES
from spdcli.recipe.bounds import BOUNDS, Certify


def test_a_row_a_number_in_the_order_of_the_table_and_parts_after_the_whole():
    measured = {
        "delta_share:Q0": Measured(0.3, "on a"),
        "l0": Measured(2.5, "on b"),
        "delta_share": Measured(0.3, "on a"),
        "pgd_shared_accuracy": Measured(0.5, "with c"),
    }
    rows = judged(measured, {"l0": 2.5, "delta_share": 0.2, "pgd_shared_accuracy": 0.5})
    assert [(row.name, row.value, row.bound, row.passed, row.budget) for row in rows] == [
        ("l0", 2.5, "≤ 2.5", True, "on b"),
        ("delta_share:Q0", 0.3, None, None, "on a"),
        ("delta_share", 0.3, "≤ 0.2", False, "on a"),
        ("pgd_shared_accuracy", 0.5, "≥ 0.5", True, "with c"),
    ]
    assert [row.grade for row in rows] == ["", "", "", "adversarial"]
    certificate = Certificate(rows=rows, passed=False)
    assert [row.name for row in certificate.failures] == ["delta_share"]


@pytest.mark.parametrize(("name", "value"), [("l0", math.nan), ("accuracy_corners", math.nan), ("l0", None)])
def test_what_is_no_number_or_was_not_measured_meets_no_bound(name, value):
    measured = {} if value is None else {name: Measured(value, "")}
    (row,) = judged(measured, {name: 0.5})
    assert row.passed is False
    assert row.budget == ("not measured" if value is None else "")


@pytest.mark.parametrize("name", BOUNDS)
def test_every_bound_is_one_sided_and_its_kind_of_evidence_is_known(name):
    row = BOUNDS[name]
    assert row.holds(1, 1)
    assert row.holds(2, 1) is row.least
    assert row.holds(0, 1) is not row.least
    assert not row.grade or row.grade in GRADES
    assert Certify(**{name: 0.25}).bounds == {name: 0.25}
