"""One function a figure: PNG and SVG, readable in grey."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from spdcli.disk import write_atomically
from spdcli.measures.svd import RankCurves


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write `figure` as NAME.png and NAME.svg into `directory`."""
    paths = []
    for kind in ("png", "svg"):
        path = directory / f"{name}.{kind}"
        write_atomically(path, partial(figure.savefig, format=kind, dpi=150, bbox_inches="tight"))
        paths.append(path)
    return paths


def distinct(number: int, points: int = 2) -> dict[str, Any]:
    """How curve `number` of a figure is drawn, so that it is told from 31 others in grey: by line, shade and mark.

    A curve of many `points` has about ten marks.
    """
    line, shade, mark = number % 4, number // 4 % 2, number // 8 % 4
    marks = {} if mark == 0 else {"marker": RANK_MARKS[mark], "markersize": 4, "markevery": max(1, points // 10)}
    return {"linestyle": RANK_LINES[line], "color": ("black", "0.5")[shade], **marks}


def save_training_curve(records: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """The toy's loss against the step, and the accuracy of one that predicts tokens (Figure 5, A.2.2): a plateau, then
    the phase change."""
    figure = Figure(figsize=(6, 3.2))
    loss_axes = figure.subplots()
    steps = [record["step"] for record in records]
    predicts = "accuracy" in records[0]
    loss_axes.plot(steps, [record["loss"] for record in records], color="black", label="loss (last token)")
    loss_axes.set(xlabel="step", ylabel="cross-entropy (nats)" if predicts else "squared error", yscale="log")
    if not predicts:
        return save(figure, directory, "training")
    accuracy_axes = loss_axes.twinx()
    accuracies = [record.get("accuracy", math.nan) for record in records]
    accuracy_axes.plot(steps, accuracies, color="0.5", linestyle="--", label="accuracy")
    accuracy_axes.set(ylabel="accuracy", ylim=(-0.02, 1.02))
    lines = [*loss_axes.get_lines(), *accuracy_axes.get_lines()]
    loss_axes.legend(handles=lines, loc="center right", frameon=False)
    return save(figure, directory, "training")


RANK_LINES = ("-", "--", "-.", ":")
RANK_MARKS = ("o", "s", "^", "x", "D")
RANK_FLOOR = 1e-8


def save_rank_curves(rank_curves: RankCurves, directory: Path) -> list[Path]:
    """Figure 2: KL (nats) against rank, a curve a method; the legend says what each calls rank.

    Rank is logarithmic above 1. A KL below RANK_FLOOR, where float32 rounds, is off the axis.
    """
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for number, (method, curve) in enumerate(rank_curves.curves.items()):
        shown = [point for point in curve if point.kl > 0]
        axes.plot(
            [point.rank for point in shown],
            [point.kl for point in shown],
            label=rank_curves.legend[method],
            **distinct(number) | {"marker": RANK_MARKS[number % len(RANK_MARKS)], "markersize": 3},
        )
    if rank_curves.tolerance > 0:
        axes.axhline(rank_curves.tolerance, color="0.7", linewidth=0.8, label="tolerance")
    unit = " (nats)" if rank_curves.measure == "KL" else ""
    axes.set(xlabel="rank", ylabel=f"{rank_curves.measure} from the target{unit}", yscale="log")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=max(RANK_FLOOR, axes.get_ylim()[0]))
    axes.legend(frameon=False, fontsize="small")
    return save(figure, directory, "svd")
