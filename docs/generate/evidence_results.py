"""What reconstruction is worth as evidence, as Markdown: the part of `spd eval` that is alike of every target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generate.markdown import joined, number, table
from spdcli.commands.evidence_tables import MEANING
from spdcli.engine.tables import GRADES
from spdcli.measures.evidence_choices import CORNERS, MASKS

Data = Mapping[str, Any]


def evidence(data: Data) -> str:
    """A row a kind of masks, the weakest evidence first; then the curve of a longer search; nothing where a recording
    is older than the measure."""
    if "evidence" not in data:
        return ""
    found = data["evidence"]
    rows = [
        [MASKS[name], GRADES[found["grades"][name]].label, number(found[name]), right(found["accuracy"].get(name)), ""]
        for name in ("importance", "stochastic", *CORNERS)
    ]
    searches = [name for name in MASKS if name.startswith("pgd") and name in found]
    strongest = GRADES["adversarial"].label
    rows += [
        [MASKS[name], strongest, number(found[name]["kl"]), right(found[name]["accuracy"]), budget(found[name])]
        for name in searches
    ]
    heads = ["masks", "evidence", "KL", "answers right", "budget"]
    return joined(["What the reconstruction is worth:", table(heads, rows, words=2), curve(found), MEANING])


def curve(found: Data) -> str:
    """The largest KL by the number of steps of a search of the same reach."""
    points = found.get("pgd_curve")
    if not points:
        return ""
    rows = [[point["steps"], f"{point['size']:.4g}", number(point["kl"]), right(point["accuracy"])] for point in points]
    words = f"With more and smaller steps, from {points[0]['starts']} random starts and the corners:"
    return joined([words, table(["steps", "size", "KL", "answers right"], rows, words=0)])


def budget(attack: Data) -> str:
    """What a search was allowed."""
    return f"{attack['steps']} × {attack['size']:g}, {attack['starts']} random starts and 2 corners"


def certificate(data: Data) -> str:
    """`spd.certify/1`: a row a number, its bound where the recipe sets one, and what was spent to find it."""
    rows = []
    for row in data["rows"]:
        graded = GRADES[row["grade"]].label if row["grade"] else ""
        holds = {None: "", True: "yes", False: "no"}[row["passed"]]
        rows.append([row["name"], graded, number(row["value"]), row["bound"] or "", holds, row["budget"]])
    bounded = [row for row in data["rows"] if row["passed"] is not None]
    words = f"{sum(row['passed'] for row in bounded)} of {len(bounded)} bounds of the recipe hold."
    heads = ["", "evidence", "value", "bound", "holds", "found on, or with"]
    return joined([words, table(heads, rows, words=2), MEANING])


def right(share: float | None) -> str:
    """A share of answers that are told right."""
    return "" if share is None else f"{share:.2%}"
