"""Figures are written, are not blank, and survive grey."""

from __future__ import annotations

import errno
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from spdcli.errors import SpdError
from spdcli.figures.curves import distinct, save, save_rank_curves, save_training_curve
from spdcli.measures.svd import CurvePoint, RankCurves
from spdcli.measures.svd_methods import METHODS


def records(loss=lambda step: 5 / (1 + step)):
    return [{"step": s, "loss": loss(s), "accuracy": min(1.0, s / 50), "rate": 0.1} for s in range(1, 100, 7)]


def test_the_training_curve_is_a_png_and_an_svg(tmp_path):
    paths = save_training_curve(records(), tmp_path / "figures")
    assert [path.name for path in paths] == ["training.png", "training.svg"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["training.png", "training.svg"]

    pixels = imread(paths[0])[..., :3]
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 600
    assert (pixels < 0.1).all(-1).mean() > 0.005  # a black curve and black text on white
    assert (pixels > 0.9).all(-1).mean() > 0.7
    grey = abs(pixels - pixels.mean(-1, keepdims=True)).max()
    assert grey < 0.01  # readable without colour

    root = ElementTree.parse(paths[1]).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall(".//{*}path")) > 10


def test_the_curve_shows_its_records(tmp_path):
    falling, flat = (
        imread(save_training_curve(records(loss), tmp_path / name)[0])
        for name, loss in (("a", lambda step: 5 / (1 + step)), ("b", lambda step: 5.0 + step % 2))
    )
    assert falling.shape != flat.shape or abs(falling - flat).max() > 0.5


def test_one_record_is_enough(tmp_path):
    assert all(path.stat().st_size > 1000 for path in save_training_curve(records()[:1], tmp_path))


def test_rank_curves_are_readable_in_grey_and_named(tmp_path):
    curves = {
        "greedy_svd": [CurvePoint(r, k) for r, k in ((40, 0.0), (20, 1e-4), (10, 0.01), (0, 2.0))],
        "spd": [CurvePoint(r, k) for r, k in ((9, 1e-4), (5, 0.01), (0, 2.0))],
    }
    legend = {name: METHODS[name].legend for name in curves}
    shown = RankCurves(1e-3, 10, legend, curves, {})
    paths = save_rank_curves(shown, tmp_path)
    assert [path.name for path in paths] == ["svd.png", "svd.svg"]
    pixels = imread(paths[0])[..., :3]
    assert abs(pixels - pixels.mean(-1, keepdims=True)).max() < 0.01
    assert (pixels < 0.1).all(-1).mean() > 0.005
    assert METHODS["greedy_svd"].legend in paths[1].read_text()  # as a comment beside the drawn letters
    assert METHODS["weighted_svd"].legend not in paths[1].read_text()
    save_rank_curves(replace(shown, tolerance=0.0, curves={"spd": curves["spd"][:1]}), tmp_path / "one")
    save_rank_curves(replace(shown, tolerance=0.0, curves={"spd": [CurvePoint(4, 0.0)]}), tmp_path / "none")


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    figure = Figure()
    path, _ = save(figure, tmp_path, "plot")
    old = path.read_bytes()

    def refuse(self, beside, **options):
        beside.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", refuse)
    with pytest.raises(SpdError, match=r"plot\.png: cannot be written: No space left on device"):
        save(figure, tmp_path, "plot")
    assert path.read_bytes() == old
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plot.png", "plot.svg"]


def test_no_two_curves_are_drawn_alike():
    assert len({tuple(sorted(distinct(number, 50).items())) for number in range(32)}) == 32
    assert {distinct(number)["color"] for number in range(32)} == {"black", "0.5"}
