"""Figures about facts are written, show their numbers, and survive grey."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from edited_models import answer_change
from matplotlib.image import imread

from spdcli.figures import facts as figures_facts
from spdcli.figures.facts import save_names, save_slices, save_trace, save_zeroed, shortened
from spdcli.location.report import ChosenSlices, FactCounts, FactReport, RunReport, SliceEffect
from spdcli.location.tracing import SiteGrid, Trace


def grey(path):
    """The picture as `[H, W]`, once it is seen to have no colour."""
    pixels = imread(path)[..., :3]
    assert abs(pixels - pixels.mean(-1, keepdims=True)).max() < 0.01
    assert ElementTree.parse(path.with_suffix(".svg")).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    return pixels.mean(-1)


def trace_of(place, tokens=4, layers=6):
    """Nothing restores the answer but the MLPs at `place`."""
    flat = SiteGrid([[0.1] * layers for _ in range(tokens)], [], [])
    high = replace(flat, probability=[[0.9 if (t, l) == place else 0.1 for l in range(layers)] for t in range(tokens)])
    sites = {"state": flat, "mlp": high, "attention": flat}
    return Trace("a b c d e", " e", (" a", " b", "c", "d"), (0, 1), 1.0, 0.9, 0.1, 0.0, sites, [])


def dark(place, folder):
    """The middle of what is black in the panel of the MLPs, as (row, column) of the picture."""
    path = save_trace(trace_of(place), folder, "trace")[0]
    shown = grey(path)
    third = shown.shape[1] // 3
    # The edge of a panel is a line of 2 pixels, a square of it is far wider.
    wide = shown[:, third : 2 * third].copy()
    black = (wide < 0.2).astype(float)
    runs = black[:-12, :-12] * black[12:, 12:] * black[12:, :-12] * black[:-12, 12:] * black[6:-6, 6:-6]
    rows, columns = runs.nonzero()
    assert len(rows) > 50
    return rows.mean(), columns.mean()


def test_a_dark_square_stands_at_its_token_and_layer(tmp_path):
    top, below, right = (dark(place, tmp_path) for place in ((1, 1), (2, 1), (1, 4)))
    assert below[0] > top[0] + 10
    assert below[1] == pytest.approx(top[1], abs=2)
    assert right[1] > top[1] + 30
    assert right[0] == pytest.approx(top[0], abs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.png", "trace.svg"]


def test_a_trace_names_its_tokens_and_its_kinds(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(figures_facts, "save", lambda figure, directory, name: kept.append(figure) or [])
    save_trace(trace_of((1, 2)), tmp_path, "trace")
    panels = kept[0].axes[:3]
    assert [axes.get_title() for axes in panels] == ["one hidden state", "a window of MLPs", "a window of attention"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [" a*", " b*", "c", "d"]
    for axes, kind in zip(panels, ("state", "mlp", "attention"), strict=True):
        assert axes.images[0].get_array().tolist() == trace_of((1, 2)).sites[kind].probability
        assert axes.images[0].get_clim() == (0.1, 0.9)


def test_zeroed_layers_are_a_line_under_a_dashed_one(tmp_path, monkeypatch):
    effect = lambda token, after: answer_change(prompt=f"a b{token}", token=token, after=after)  # noqa: E731
    alone = {f"mlp {layer}": [effect(" c", 0.1 * layer), effect(" d", 0.4)] for layer in (0, 1, 3)}
    grey(save_zeroed(alone, tmp_path)[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlp-zeroed.png", "mlp-zeroed.svg"]
    kept = []
    monkeypatch.setattr(figures_facts, "save", lambda figure, directory, name: kept.append(figure) or [])
    save_zeroed(alone, tmp_path)
    panels = kept[0].axes
    assert [axes.get_title() for axes in panels] == ["a b c", "a b d"]
    line, whole = panels[0].get_lines()
    assert line.get_xdata().tolist() == [0, 1, 3]
    assert line.get_ydata().tolist() == pytest.approx([0.0, 0.1, 0.3])
    assert list(whole.get_ydata()) == [0.5, 0.5]
    assert whole.get_linestyle() == "--"
    assert panels[1].get_lines()[0].get_ydata().tolist() == [0.4] * 3
    save_zeroed({label: effects * 2 for label, effects in alone.items()}, tmp_path)
    assert len(kept[1].axes) == 6  # two rows of three, of which two are empty
    assert shortened("x" * 50) == "x" * 43 + "…"


def slices(token, ratios):
    return SliceEffect(["m:0"], [token], [0.5] * 2, [ratio / 2 for ratio in ratios], ratios)


def fact_of(prompt, answer, effects):
    """One prompt's part of a report, as far as it is drawn."""
    trace = Trace(prompt, answer, (), (), 1.0, 0.5, 0.1, 0.0, {}, [])
    return FactReport(prompt, answer, (), (), trace, "", 0.5, ChosenSlices([], []), (), [], effects, [])


def test_figures_of_slices_have_a_bar_for_every_number(tmp_path, monkeypatch):
    first = fact_of("a b c", " c", [slices(" a", [0.2, 0.9]), slices("b", [0.1, 1])])
    second = fact_of("d e", " e", [slices("d", [1.1, 0.3])])
    report = RunReport("m", FactCounts(asked=0, known=0), {}, [first, second])
    for paths in (save_slices(report, tmp_path), save_names(first, 0, tmp_path, "names-1")):
        grey(paths[0])
    kept = []
    monkeypatch.setattr(figures_facts, "save", lambda figure, directory, name: kept.append(figure) or [])
    save_slices(report, tmp_path)
    save_names(first, 0, tmp_path, "names-1")
    heights = [[bar.get_height() for bar in figure.axes[0].patches] for figure in kept]
    assert heights == [pytest.approx([0.2, 0.9, 0.1, 1, 0.3, 1.1]), pytest.approx([0.5, 0.1, 0.05])]
    assert [label.get_text() for label in kept[1].axes[0].get_xticklabels()] == ["nothing", "“a”", "“b”"]
