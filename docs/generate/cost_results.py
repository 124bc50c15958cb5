"""Results about time and memory as Markdown: `spd bench`, `spd plan`, `spd compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from generate.markdown import code, duration, joined, memory, number, table, threads
from spdcli.commands.evidence_tables import grade_of
from spdcli.engine.tables import GRADES
from spdcli.measures.evidence_choices import CORNERS
from spdcli.paper.table1 import FOUND_AT

Data = Mapping[str, Any]

PAPER_TABLE_2 = {  # steps a second at each length, on a machine that the paper does not name
    "scalar": {16: 12, 64: 12, 1024: 9, 10240: 11},
    "vector": {16: 13, 64: 13, 1024: 10, 10240: 11},
    "attention dense": {16: 10, 64: 10, 1024: 2, 10240: 1},
    "attention blocked": {16: 10, 64: 10, 1024: 6, 10240: 6},  # the paper's with flex attention
    "attention flex": {16: 10, 64: 10, 1024: 6, 10240: 6},
}
COMPARED = ("recon", "recon_layerwise", "stochastic_recon", "faithfulness")


def benchmark(data: Data) -> str:
    """`spd.bench/1`: a row a case, then the ratios of the same run; importance functions stand beside Table 2."""
    batches = any("batch" in row for row in data["rows"])
    beside = data["benchmark"] == "importance"
    heads = ["case", *["batch"] * batches, "s a step", "steps a s", *["paper"] * beside, *FURTHER]
    rows = []
    for row in data["rows"]:
        batch = [row["batch"]] if batches else []
        speed = ["not measured", ""] if "skipped" in row else [f"{row['seconds']:.3g}", f"{1 / row['seconds']:.3g}"]
        rows.append([row["name"], *batch, *speed, *[paper_speed(row["name"])] * beside, *further(row)])
    machine = data["machine"]
    where = machine.get("gpu") or f"{machine['processor']}, {threads(machine['threads'])}"
    ratios = [[name, f"{ratio:.2f}"] for name, ratio in data["ratios"].items()]
    shown = table(["ratio", ""], ratios) if ratios else ""
    return joined([f"{where}, torch {machine['torch']}:", table(heads, rows), shown])


FURTHER = ("peak GB", "GFLOP", "GFLOP/s", "of a product")


def further(row: Data) -> list[str]:
    """Memory, operations and rates of a measured case."""
    if "skipped" in row:
        return [""] * len(FURTHER)
    rates = (row["flops"] / 1e9, row["flops_per_second"] / 1e9)
    return [f"{row['peak_bytes'] / 1e9:.2f}", *(f"{rate:.1f}" for rate in rates), f"{row['product_share']:.0%}"]


def paper_speed(name: str) -> str:
    """The paper's steps a second for a case of Table 2."""
    kind, _, length = name.partition(", length ")
    return str(PAPER_TABLE_2.get(kind, {}).get(int(length or 0), ""))


def cost(data: Data) -> str:
    """`spd.plan/1`: parameters, memory, operations and time."""
    rows = [[f"parameters of {name}", f"{count:,}"] for name, count in data["parameters"].items()]
    rows += [[f"memory: {name}", memory(count)] for name, count in data["bytes"].items()]
    rows.append(["operations of a step", f"{data['flops_per_step'] / 1e9:,.1f} GFLOP"])
    if data["seconds"] is not None:
        rows.append(["a step", f"{data['seconds_per_step']:.3g} s"])
        rows.append([f"all {data['steps']} steps", duration(data["seconds"])])
    verdict = "It fits" if data["fits"] else f"It does not fit; what would help: {', '.join(map(code, data['change']))}"
    return joined([f"{data['matrices']} matrices, {data['tokens']} tokens a step. {verdict}.", table(["", ""], rows)])


def comparison(data: Data) -> str:
    """`spd.compare/1`: a row a run; L0 is active slices a position, of importance above 0 and above 0.1."""
    rows = [
        [
            row["with"] if row is data["rows"][0] else code(row["with"]),
            row["steps"],
            f"{row['seconds']:.0f}",
            f"{row['seconds'] / row['steps']:.3g}",
            f"{row['l0']:.2f}",
            f"{row['l0_above_tenth']:.2f}",
            row["total_active"],
            *(number(row["metrics"][name]) for name in COMPARED),
            *strong(row),
        ]
        for row in data["rows"]
    ]
    counts = ("L0", "above 0.1", "active")
    heads = ["", "steps", "seconds", "s a step", *counts, *map(graded, COMPARED)]
    heads += ["worst corner", f"PGD, {GRADES['adversarial'].label}"] * ("evidence" in data["rows"][0])
    times = "At equal steps, then at equal time:"
    if len({row["steps"] for row in data["rows"]}) == 1:
        times = "At equal steps:"
    return joined([times, table(heads, rows), by_class(data["rows"]), of_parts(data["rows"])])


def by_class(runs: Sequence[Data]) -> str:
    """Where a toy's slices are active, each matrix at the position class of Table 1, and how many it has in all;
    nothing of other targets, or of a recording that is older."""
    if "active_by_class" not in runs[0]:
        return ""
    heads = ["", *(f"{name} at {kind} (unique)" for name, kind in FOUND_AT.items())]
    rows = [
        [
            run["with"] if run is runs[0] else code(run["with"]),
            *(f"{run['active_by_class'][name][kind]:.3f} ({run['unique'][name]})" for name, kind in FOUND_AT.items()),
        ]
        for run in runs
    ]
    return joined(["Active slices at the positions where the paper found them, and unique ones:", table(heads, rows)])


def of_parts(runs: Sequence[Data]) -> str:
    """What is found of the known parts of a toy of sparse features, and live slices; nothing of other targets."""
    if "parts" not in runs[0]:
        return ""
    measures = {"max cosine": "mean_max_cosine", "L2 ratio": "l2_ratio"}
    said = lambda value: "none" if value is None else f"{value:.4f}"  # noqa: E731
    heads = [f"{name}, {matrix}" for matrix in runs[0]["parts"] for name in measures]
    heads += [f"live in {matrix}" for matrix in runs[0]["live"]]
    rows = [
        [
            run["with"] if run is runs[0] else code(run["with"]),
            *(said(run["parts"][matrix][key]) for matrix in runs[0]["parts"] for key in measures.values()),
            *(run["live"][matrix] for matrix in runs[0]["live"]),
        ]
        for run in runs
    ]
    return joined(["The parts that are found, and slices that live on some feature:", table(["", *heads], rows)])


def graded(loss: str) -> str:
    """A loss's name, with what it is worth as evidence."""
    return ", ".join(filter(None, [loss.replace("_", " "), grade_of(loss)]))


def strong(row: Data) -> list[str]:
    """The worst corner and the worst masks of a search; nothing of a recording that is older."""
    if "evidence" not in row:
        return []
    found = row["evidence"]
    return [number(max(found[name] for name in CORNERS)), number(found["pgd_shared"]["kl"])]
