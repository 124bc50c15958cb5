"""How a decomposition was trained: the terms of its loss and its active slices, PNG and SVG, readable in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from spdcli.figures.curves import distinct, save


def save_decomposition_curves(records: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """Every term of the loss, before its coefficient, and the sum of active slices a position, against the step."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    losses, active = figure.subplots(1, 2)
    steps = [record["step"] for record in records]
    for number, name in enumerate(records[-1]["losses"]):
        values = [record["losses"].get(name) for record in records]
        losses.plot(steps, values, label=name, **distinct(number, len(steps)))
    losses.set(xlabel="step", ylabel="loss", yscale="log")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    active.plot(steps, [sum(record["active"].values()) for record in records], color="black")
    active.set(xlabel="step", ylabel="active slices a position", ylim=(0, None))
    return save(figure, directory, "decomposition")
