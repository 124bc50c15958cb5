"""The explorer of toys of sparse features: inputs by matrices, and outputs, as `spd inspect` and `spd ablate` tell."""

from __future__ import annotations

import pytest
import torch

import spdcli
from spdcli.explorer.features import FeatureExploration, OutputChange, OutputChanges
from spdcli.explorer.rendering import changed_outputs

SHAPES = {
    "tms": {"features": 5, "hidden": 3, "identity": True},
    "resid_mlp": {"features": 5, "d_model": 8, "d_mlp": 3, "layers": 2},
}


@pytest.fixture(scope="module", params=list(SHAPES))
def run(request):
    sections = {
        "name": "small",
        "seed": 4,
        "target": {"kind": request.param, **SHAPES[request.param]},
        "train": {"batch": 16, "steps": 40, "learning_rate": 0.02},
        "slices": {"C": 6, "delta": True},
        "importance": {"kind": "scalar", "gate_width": 3},
        "losses": {"recon": 1.0, "faithfulness": 1.0},
        "decompose": {"batch": 8, "steps": 3},
    }
    return spdcli.decompose(sections)


def test_the_map_is_the_sum_of_importances_of_every_feature_alone(run):
    exploration = run.explore()
    assert isinstance(exploration, FeatureExploration)
    view = exploration.prompt(3)
    assert (view.pieces, view.position, view.matrices) == (list("01234"), 2, run.matrices)
    for feature in range(5):
        g = run.importances(str(feature))
        wanted = torch.stack([g[name].sum() for name in run.matrices])
        torch.testing.assert_close(view.heat[:, feature], wanted)
    place = run.inspect(matrices=[run.matrices[0]]).occurrences[2]
    assert [one.slice for one in exploration.slices(view, 0, 2)] == [one.slice for one in place.slices]


@pytest.mark.parametrize(("way", "others"), [("ablate", "on"), ("importance", "importance")])
def test_outputs_without_slices_are_what_ablate_says(run, way, others):
    off = [f"{run.matrices[0]}:0", f"{run.matrices[1]}:2"]
    exploration = run.explore()
    effects = {one.feature: one for one in run.ablate(off, others=others).effects}
    for feature in range(5):
        said = exploration.outputs(exploration.prompt(feature + 1), off, way)
        (own,) = [one for one in said.outputs if one.on]
        effect = effects[feature]
        assert (own.feature, said.input, said.off) == (feature, str(feature), off)
        assert (own.before, own.after, said.squared) == pytest.approx((effect.before, effect.after, effect.squared))
    sizes = [max(abs(one.before), abs(one.after)) for one in said.outputs]
    assert sizes == sorted(sizes, reverse=True)


def test_with_nothing_off_the_outputs_are_the_toys(run):
    exploration = run.explore()
    view = exploration.typed("3 1:0.2")
    said = exploration.outputs(view)
    values = torch.zeros(1, 1, 5)
    values[..., 3], values[..., 1] = 0.75, 0.2
    with torch.no_grad():
        wanted = run.model(values)[0, 0]
    assert (said.squared, said.input) == (0, "1:0.2 3:0.75")
    assert {one.feature for one in said.outputs if one.on} == {1, 3}
    for one in said.outputs:
        assert one.after == pytest.approx(wanted[one.feature].item(), abs=1e-6)


def test_what_makes_no_sense_is_refused(run):
    exploration = run.explore()
    view = exploration.prompt(1)
    with pytest.raises(spdcli.UsageError, match="expected one of ablate, importance"):
        exploration.outputs(view, [], "suppress")
    with pytest.raises(spdcli.UsageError, match="has no tokens"):
        exploration.next_tokens(view)


def test_outputs_as_lines_by_hand():
    changes = [OutputChange(2, 0.5, 0.25, True), OutputChange(0, -0.1, 0.125, False)]
    lines = changed_outputs(OutputChanges("ablate", ["W:0"], "2", changes, 0.0123), "off", 31, 9).plain.splitlines()
    assert lines[0] == "outputs for 2  squared change 0.0123"
    assert lines[1:3] == ["→    2 +0.500 +0.250 ████░░░░", "     0 -0.100 +0.125 ▓▓"]


@pytest.mark.parametrize("size", [(80, 24), (120, 34)], ids=["80", "120"])
def test_the_screen(run, size):
    pytest.importorskip("textual", reason="Textual is not installed")
    from screens import drive, press, said
    from textual.widgets import DataTable, Footer

    async def script(app, pilot):
        table, view = app.query_one("#map", DataTable), app.view
        assert (table.row_count, len(table.columns)) == (5, len(run.matrices))
        assert [str(row.label) for row in table.ordered_rows] == list("01234")
        row, column = table.cursor_row, table.cursor_column
        assert (row, column) == (0, int(view.heat[:, 0].argmax()))
        value = view.heat[column, row].item()
        assert str(table.get_cell_at((row, column))) == (f"{value:.2f}" if value else "·")
        assert said(app, "#title") == "each of 5 features alone"
        await press(app, pilot, "down", "down")
        assert app.next_tokens == app.exploration.outputs(app.exploration.prompt(3))
        assert said(app, "#next").startswith("outputs for 2\n")
        assert said(app, "#place").startswith(f"{run.matrices[column]} on input 2: ")
        await press(app, pilot, "w")
        assert [one.message for one in app._notifications] == ["switch slices off first: they are what is taken away"]
        await press(app, pilot, "a")
        assert app.off == [one.slice for one in app.listed]
        assert app.next_tokens == app.exploration.outputs(app.exploration.prompt(3), app.off)
        assert app.next_tokens.squared > 0
        await press(app, pilot, "m", "w")
        assert app.next_tokens.way == "importance"
        assert any(f"spd ablate RUN --slice {app.off[0]}" in one.message for one in app._notifications)
        for widget in (table, app.query_one("#slices"), app.query_one("#next"), app.query_one(Footer)):
            assert widget.region.right <= size[0]
            assert widget.region.bottom <= size[1]
            assert min(widget.region.size) > 0
        room = app.query_one("#next").content_size.width
        assert all(len(line) <= room for line in said(app, "#next").splitlines()[1:-1])
        await press(app, pilot, "n")
        assert table.cursor_row == 3
        await press(app, pilot, "t", *"3 1:0.2", "enter")
        assert (app.view.pieces, said(app, "#title")) == (["1:0.2 3:0.75"], "1:0.2 3:0.75")
        assert table.row_count == 1

    drive(run, size, script)
