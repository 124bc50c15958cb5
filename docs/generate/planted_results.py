"""Results of planted targets as Markdown: what each method finds of slices that are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generate.markdown import joined, number, table

Data = Mapping[str, Any]

METHODS = {
    "spd": "SPD",
    "apd": "APD, top k",
    "svd": "SVD, all of it",
    "greedy_svd": "greedy SVD",
    "weighted_svd": "greedy SVD, weighted",
}
NUMBERS = ("precision", "recall", "cosine", "weights", "missing", "idle")
LEGEND = """\
*Precision* and *recall* are of slices whose cosine with a planted one is at least 0.95. *Cosine* is a mean over planted
slices, as the data sees them; *weights* is that of the rank-1 matrices, whatever the data sees. *Missing* is the share
of needed positions at which a slice is off, *idle* that of active ones at which nothing needs it; methods without
either say nothing of positions."""


def reproduction(data: Data) -> str:
    """`spd.reproduce/1` of planted targets: a row a target and method, the bounds, then seed by seed."""
    rows = []
    for row in data["recovery"]:
        values = ["" if row["recovery"][key] is None else f"{row['recovery'][key]:.3f}" for key in NUMBERS]
        rows.append([row["target"], METHODS.get(row["method"], row["method"]), *values])
    words = f"Means of {len(data['seeds'])} seeds." if len(data["seeds"]) > 1 else ""
    bounds = [
        [row["name"], number(row["ours"]), row["bound"] or f"({row['agreement']})", f"{row['share']:.0%} of seeds"]
        for row in data["rows"]
    ]
    return joined(
        [
            words,
            table(["target", "method", *NUMBERS], rows),
            LEGEND,
            "Bounds of SPD's (in brackets: not stated ones, which say what counts as agreeing):",
            table(["", "ours", "bound", "holds on"], bounds),
            seeds(data),
        ]
    )


def seeds(data: Data) -> str:
    """A line a seed: how many bounds it breaks, its cosines, and how long the decompositions took."""
    targets = list(data["seeds"][0]["recovery"])
    rows = []
    for seed in data["seeds"]:
        cosines = [f"{seed['recovery'][target]['spd']['total']['cosine']:.3f}" for target in targets]
        minutes = [f"{seed['minutes'][target]:.1f}" for target in targets]
        rows.append([seed["seed"], len(seed["broken"]), *cosines, *minutes])
    heads = [
        "seed",
        "bounds broken",
        *(f"cosine, {name}" for name in targets),
        *(f"minutes, {name}" for name in targets),
    ]
    return joined(["Seed by seed:", table(heads, rows)])
