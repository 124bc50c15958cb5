"""Figures of the induction circuit (Figure 1, section 6.1), by `spd eval` of the toy: PNG and SVG, readable in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import MaxNLocator

from spdcli.figures.curves import distinct, save
from spdcli.measures.circuit import Circuit, CircuitExample, ImportanceProfile
from spdcli.measures.circuit_identity import Identity
from spdcli.measures.circuit_offsets import Offsets
from spdcli.targets.sequences import POSITION_CLASSES


def save_circuit(circuit: Circuit, example: CircuitExample, names: Sequence[str], directory: Path) -> None:
    """All figures of one run; `names` are those of the example's tokens."""
    save_sequence(example, names, directory)
    save_importance(circuit.importance, directory)
    save_attention(example, directory)
    save_mechanism(circuit, directory)


def save_sequence(example: CircuitExample, names: Sequence[str], directory: Path) -> list[Path]:
    """Figure 1: one sequence with s1, m and s2 marked, and what attends to what in the two layers."""
    length, at = len(names), example.at
    figure = Figure(figsize=(max(5.0, 0.19 * length), 2.4))
    axes = figure.subplots()
    labels = {place: kind for kind, place in at.items()}
    for place, name in enumerate(names):
        marked = place in labels
        axes.add_patch(Rectangle((place - 0.5, -0.5), 1, 1, facecolor="0.75" if marked else "white", edgecolor="0.6"))
        axes.text(place, 0, name, ha="center", va="center", fontsize=5.5, weight="bold" if marked else "normal")
        if marked:
            axes.text(place, -1.0, labels[place], ha="center", va="center", fontsize=8)
    for layer, (query, key) in enumerate((("m", "s1"), ("s2", "m"))):
        strength = example.target[layer][at[query], at[key]]
        _arc(axes, at[query], at[key], f"layer {layer}: {query} attends to {key} ({strength:.2f})")
    axes.set(xlim=(-1, length), ylim=(-1.4, 3.2), aspect="equal")
    axes.set_axis_off()
    return save(figure, directory, "sequence")


def _arc(axes: Axes, start: int, stop: int, label: str) -> None:
    height = 1.6 if start - stop == 1 else 3.2
    bend = height / max(1, start - stop)
    path = f"arc3,rad={bend}"
    ends = ((start, 0.55), (stop, 0.55))
    axes.add_patch(FancyArrowPatch(*ends, connectionstyle=path, arrowstyle="-|>", mutation_scale=8, color="black"))
    left = start - stop == 1
    axes.text(
        stop - 0.6 if left else (start + stop) / 2,
        1.1 if left else 0.55 + height / 2 + 0.3,
        label,
        ha="right" if left else "center",
        fontsize=7,
    )


def save_importance(importance: ImportanceProfile, directory: Path) -> list[Path]:
    """Mean summed importance of every matrix: by position class, and by distance from s1. Black is the largest; shades
    go by the square root, so that 1 is seen beside 10."""
    matrices, distances = list(importance.classes), importance.distances
    figure = Figure(figsize=(9, 0.4 * len(matrices) + 1.6), layout="constrained")
    by_class, by_distance = figure.subplots(1, 2, width_ratios=[1, 2.4])
    values = [[importance.classes[name][kind] for kind in POSITION_CLASSES] for name in matrices]
    by_place = [importance.by_distance[name] for name in matrices]
    norm = PowerNorm(0.5, 0.0, max(1e-9, *(max(line) for line in [*values, *by_place])))
    by_class.imshow(values, cmap="Greys", norm=norm, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            colour = "white" if norm(value) > 0.5 else "black"
            by_class.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    by_class.set_xticks(range(len(POSITION_CLASSES)), POSITION_CLASSES)
    shown = by_distance.imshow(by_place, cmap="Greys", norm=norm, aspect="auto")
    by_distance.set_xticks(range(len(distances)), [f"{d:+d}" if d else "s1" for d in distances], fontsize=8)
    by_distance.set_xlabel("position, counted from s1 (m is +1)")
    for axes in (by_class, by_distance):
        axes.set_yticks(range(len(matrices)), matrices)
    figure.colorbar(shown, ax=by_distance, label="sum of importances")
    return save(figure, directory, "importance")


def save_attention(example: CircuitExample, directory: Path) -> list[Path]:
    """Attention of one sequence, both layers: original, decomposed, and their difference. Circles: what must be."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    grid = figure.subplots(2, 3)
    at = example.at
    steps = ((at["m"], at["s1"]), (at["s2"], at["m"]))
    for layer in range(2):
        original, decomposed = example.target[layer], example.masked[layer]
        panels = (("original", original), ("active slices alone", decomposed), ("difference", decomposed - original))
        for axes, (title, pattern) in zip(grid[layer], panels, strict=True):
            signed = title == "difference"
            image = axes.imshow(pattern, cmap="gray" if signed else "Greys", vmin=-1 if signed else 0, vmax=1)
            query, key = steps[layer]
            axes.plot(key, query, marker="o", markersize=9, fillstyle="none", color="black")
            axes.plot(key, query, marker="o", markersize=11, fillstyle="none", color="white")
            axes.set_title(f"layer {layer}, {title}", fontsize=9)
            axes.set(xlabel="key", ylabel="query")
            figure.colorbar(image, ax=axes, shrink=0.8)
    return save(figure, directory, "attention")


def save_mechanism(circuit: Circuit, directory: Path) -> list[Path]:
    """How K0's slices tell the next position, what V1 spans, and how many directions tell the tokens apart.

    A panel whose matrices are not decomposed is left out; without any panel there is no figure.
    """
    offsets, identity = circuit.offsets, circuit.identity
    panels = (offsets is not None) + 2 * (identity is not None)
    if panels == 0:
        return []
    figure = Figure(figsize=(3.6 * panels, 3.2), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if offsets is not None:
        _draw_offsets(axes.pop(0), offsets)
    if identity is not None:
        _draw_identity(axes[0], axes[1], identity)
    return save(figure, directory, "mechanism")


def _draw_offsets(axes: Axes, offsets: Offsets) -> None:
    axes.plot(offsets.offsets, offsets.whole.scores, color="black", linewidth=2, label="W of Q0 and K0")
    of_keys = [entry for entry in offsets.slices if entry.slice.startswith("K0")]
    for number, entry in enumerate(of_keys):
        label = entry.slice if number < 6 else None
        style = distinct(number + 1, len(offsets.offsets))
        axes.plot(offsets.offsets, entry.scores, linewidth=1, label=label, **style)
    axes.axvline(1, color="0.7", linewidth=0.8)
    axes.set(xlabel="query position - key position", ylabel="score of encodings alone", title="keys of K0's slices")
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _draw_identity(values: Axes, decoding: Axes, identity: Identity) -> None:
    lines: tuple[tuple[Sequence[float], dict[str, Any], str], ...] = (
        (identity.singular_values_target, {"color": "black", "marker": "o"}, "W"),
        (identity.singular_values, {"color": "0.5", "marker": "x", "linestyle": "--"}, "active slices"),
    )
    for singular_values, style, label in lines:
        numbers = range(1, len(singular_values) + 1)
        values.plot(numbers, singular_values, linewidth=0.7, markersize=4, label=label, **style)
    values.set(xlabel="number", ylabel="singular value", title="V1", ylim=(0, None))
    values.legend(frameon=False, fontsize=7)
    numbers = range(1, len(identity.decoding) + 1)
    decoding.plot(numbers, identity.decoding, color="black", marker="o", markersize=4)
    decoding.set(xlabel="directions of what V1 writes at m", ylabel="m told right", title="identity", ylim=(0, 1.05))
    for axes in (values, decoding):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
