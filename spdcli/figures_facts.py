"""Figures about facts (the paper's 3, 4, 7, 8 and 9): PNG and SVG, readable in grey."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from spdcli.figures import save

PANELS = {"state": "one hidden state", "mlp": "a window of MLPs", "attention": "a window of attention"}


def save_trace(traced: Mapping[str, Any], directory: Path, name: str) -> list[Path]:
    """Figures 7 and 8: P(answer) after restoring each place, a panel a kind; `*` marks the corrupted tokens.

    `traced` is one prompt's part of `spd.trace/1`.
    """
    rows = [f"{token}{'*' if at in traced['subject'] else ''}" for at, token in enumerate(traced["tokens"])]
    columns = len(traced["sites"]["state"]["probability"][0])
    figure = Figure(figsize=(3.2 * len(PANELS) + 1.6, 1.5 + 0.24 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    lowest = min(min(map(min, one["probability"])) for one in traced["sites"].values())
    highest = max(traced["clean"], *(max(map(max, one["probability"])) for one in traced["sites"].values()))
    for axes, (kind, title) in zip(panels, PANELS.items(), strict=True):
        image = axes.imshow(
            traced["sites"][kind]["probability"], cmap="Greys", vmin=lowest, vmax=highest, aspect="auto"
        )
        axes.set(title=title, xlabel="layer")
        axes.set_xticks(range(0, columns, max(1, columns // 6)))
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(labelsize="small")
    bar = figure.colorbar(image, ax=panels, pad=0.01)
    bar.set_label(f"P({traced['answer'].strip()})")
    for level, style in ((traced["clean"], "-"), (traced["corrupted"], "--")):
        bar.ax.axhline(level, color="0.5", linestyle=style)
    figure.suptitle(f"“{traced['prompt']}”: restoring", fontsize="medium")
    return save(figure, directory, name)
