"""What the slices of a feature toy answer to: Figures 8 and 12 of the first SPD paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from spdcli.figures.curves import save

SPARE = 1  # slices beyond the live ones that are drawn, to show that they are off


def save_features(alone: Mapping[str, Tensor], directory: Path) -> list[Path]:
    """The importance of every slice on every feature alone, `alone[m]` `[F, C]`: a picture a matrix.

    Slices that are off everywhere are left out; the others stand in the order of the feature that needs them most, so
    that one slice a feature is a diagonal.
    """
    figure = Figure(figsize=(2.6 * len(alone) + 0.6, 3.0), layout="constrained")
    axes = figure.subplots(1, len(alone), squeeze=False)[0]
    for place, (name, g) in zip(axes, alone.items(), strict=True):
        shown = g[:, diagonal_order(g)].cpu()
        picture = place.imshow(shown.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        place.set(title=name, xlabel="slice", ylabel="feature that is on" if place is axes[0] else "")
    figure.colorbar(picture, ax=list(axes), label="importance")
    return save(figure, directory, "features")


def diagonal_order(g: Tensor) -> Tensor:
    """The slices of `g` `[F, C]` that are on somewhere, by the feature on which they are most; then SPARE others."""
    peak, feature = g.max(0)
    order = torch.argsort(torch.where(peak > 0, feature, len(g)), stable=True)
    return order[: int((peak > 0).sum()) + SPARE]
