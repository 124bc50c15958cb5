"""Figures of the circuit are written, and survive grey."""

from __future__ import annotations

import pytest
import torch
from matplotlib.image import imread
from small_circuits import ALL, small_circuit

from spdcli.figures.circuit import save_circuit, save_importance
from spdcli.measures.circuit import ImportanceProfile, example, measure_circuit


@torch.no_grad()
@pytest.mark.parametrize("names", [ALL, ["V0", "Q1"]], ids=["all", "some"])
def test_the_figures_are_readable_in_grey(tmp_path, names):
    data = small_circuit(tmp_path, names=names)
    shown = example(data)
    save_circuit(measure_circuit(data, seed=0), shown, [str(token) for token in shown.tokens], tmp_path / "figures")
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    figures = ["attention", "importance", "mechanism", "sequence"]
    if "K0" not in names:
        figures.remove("mechanism")  # there is nothing to draw
    assert files == [f"{name}.{kind}" for name in figures for kind in ("png", "svg")]
    for name in figures:
        pixels = imread(tmp_path / "figures" / f"{name}.png")[..., :3]
        assert abs(pixels - pixels.mean(-1, keepdims=True)).max() < 0.01, name


def test_an_importance_of_one_is_seen_beside_nine(tmp_path):
    classes = {"V1": {"s1": 0.0, "m": 9.0, "s2": 1.0, "random": 0.0}}
    files = save_importance(
        ImportanceProfile(classes=classes, by_distance={"V1": [0.0, 9.0]}, distances=[0, 1]), tmp_path
    )
    pixels = imread(files[0])[..., 0]
    assert ((pixels > 0.6) & (pixels < 0.85)).mean() > 0.02  # the cell of 1, which is not as black as that of 9
    assert (pixels < 0.05).mean() > 0.02
