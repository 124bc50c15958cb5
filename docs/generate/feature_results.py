"""Results of toys of sparse features as Markdown: `spd eval`, and the published numbers of their known parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generate.markdown import joined, number, table
from generate.planted_results import METHODS

Data = Mapping[str, Any]


def evaluation(data: Data) -> str:
    """`spd.eval/2` of a toy of sparse features: slices and parts, then the losses."""
    rows = []
    for name, live in data["live"].items():
        active, parts = data["active"][name], data["parts"].get(name)
        found = [str(parts["own"]), *measures(parts)] if parts else [""] * 3
        rows.append([name, live, f"{active['data']:.2f}", f"{active['single']:.2f}", *found])
    heads = ["matrix", "live", "active on data", "on one feature", "features of their own", "max cosine", "L2 ratio"]
    losses = [[name, number(value), number(data["standard_error"][name])] for name, value in data["metrics"].items()]
    losses += [[f"error to the labels, {kind}", number(value), ""] for kind, value in data["error"].items()]
    words = f"A slice lives where its importance on one feature is above {data['live_above']:g}."
    metrics = table(["metric", "value", "standard error"], losses)
    return joined([table(heads, rows), words, f"Over {data['sequences']} fresh inputs:", metrics])


def measures(parts: Data) -> list[str]:
    """The mean max cosine and the L2 ratio."""
    return [share(parts["mean_max_cosine"]), share(parts["l2_ratio"])]


def share(value: float | None) -> str:
    """A cosine or a ratio, near 1."""
    return "none lives" if value is None else f"{value:.4f}"


def reproduction(data: Data) -> str:
    """`spd.reproduce/1` of toys whose parts are known: every published number, then seed by seed."""
    several = len(data["seeds"]) > len(data["recipes"])
    rows = []
    for row in data["rows"]:
        spread = [number(row["spread"][key]) for key in ("std", "min", "max")] if several else []
        theirs = "" if row["paper"] is None else number(row["paper"])
        agrees = f"{row['share']:.0%} of seeds" if several else ("yes" if row["agrees"] else "no")
        rows.append([row["name"], f"{row['ours']:.4g}", *spread, theirs, row["bound"], agrees])
    spreads = ["std", "least", "most"] if several else []
    heads = ["", "ours", *spreads, "published", "bound", "holds on" if several else "holds"]
    others = "What other methods find of the parts, means over seeds (singular slices are on for every feature):"
    return joined([table(heads, rows), "Seed by seed:", seeds(data), others, methods(data)])


def methods(data: Data) -> str:
    """A line a recipe, matrix and method other than SPD."""
    rows = [
        [row["recipe"], row["matrix"], METHODS[row["method"]], *measures(row), f"{row['own']:g}"]
        for row in data["methods"]
    ]
    return table(["recipe", "matrix", "method", "max cosine", "L2 ratio", "features of their own"], rows)


def seeds(data: Data) -> str:
    """A line a seed: the bounds that it breaks, what it cost, and how many features have a slice of their own."""
    rows = []
    for seed in data["seeds"]:
        own = ", ".join(f"{count} in {name}" for name, count in seed["own"].items())
        broken = ", ".join(name.partition(": ")[2] for name in seed["broken"]) or "none"
        loss = number(seed["metrics"]["stochastic_recon"])
        rows.append([seed["recipe"], seed["seed"], own, loss, f"{seed['minutes']:.1f}", broken])
    heads = ["recipe", "seed", "features with a slice of their own", "stochastic recon", "minutes", "bounds broken"]
    return table(heads, rows)
