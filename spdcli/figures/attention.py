"""Attention patterns of a text, every block and head at once: PNG and SVG, readable in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from spdcli.figures.curves import save

GAP = 1  # cells between tiles


def save_patterns(target: Sequence[Tensor], masked: Sequence[Tensor], directory: Path) -> list[Path]:
    """Attention log-probabilities `[B, H, T, T]` a block, of the target and of active slices alone: of the first
    sequence, a tile a head, black where all attention is."""
    tile = target[0].shape[-1] + GAP
    blocks, heads = len(target), target[0].shape[1]
    inch = min(0.9, 4.2 / heads)
    figure = Figure(figsize=(2 * max(2.2, inch * heads) + 0.8, max(2.0, inch * blocks + 0.8)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, patterns in zip(panels, ("target", "active slices alone"), (target, masked), strict=True):
        shown = axes.imshow(mosaic(patterns).numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([tile * (head + 0.5) - 1 for head in range(heads)], range(heads), fontsize="small")
        axes.set_yticks([tile * (block + 0.5) - 1 for block in range(blocks)], range(blocks), fontsize="small")
        axes.set(title=title, xlabel="head")
    panels[0].set_ylabel("block")
    figure.colorbar(shown, ax=panels, label="attention", shrink=0.8)
    return save(figure, directory, "patterns")


def mosaic(patterns: Sequence[Tensor]) -> Tensor:
    """The attention of the first sequence, blocks below each other and heads side by side, grey in between."""
    length = patterns[0].shape[-1]
    rows = []
    for pattern in patterns:
        tiles = pattern[0].detach().exp().float().cpu()  # [H, T, T]
        framed = torch.full((len(tiles), length + GAP, length + GAP), 0.35)
        framed[:, :length, :length] = tiles
        rows.append(torch.cat(list(framed), dim=1))
    return torch.cat(rows)[:-GAP, :-GAP]
