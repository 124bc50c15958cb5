"""The explorer's screen, driven by keys at 80 and 120 columns."""

from __future__ import annotations

import pytest
from small_runs import one_line, spd_here

from spdcli.edits.script import load_script

pytest.importorskip("textual", reason="Textual is not installed")

from screens import drive, press, said
from textual.widgets import DataTable, Footer, Input

SIZES = pytest.mark.parametrize("size", [(80, 24), (120, 34)], ids=["80", "120"])


@SIZES
@pytest.mark.parametrize("kind", ["toy_run", "language_run"])
def test_the_map_has_a_cell_a_matrix_and_token(kind, size, request):
    run = request.getfixturevalue(kind)

    async def script(app, pilot):
        view, table = app.view, app.query_one("#map", DataTable)
        assert (table.row_count, len(table.columns)) == view.heat.shape
        assert app.place == divmod(int(view.heat.argmax()), len(view.pieces))  # the hottest one is where it begins
        for row, column in ((0, 0), app.place):
            value = view.heat[row, column].item()
            assert str(table.get_cell_at((row, column))) == (f"{value:.2f}" if value else "·")
        assert f"prompt 1 of {len(app.exploration.own.texts)}: {view.text}" in said(app, "#title")
        for widget in (table, app.query_one("#slices"), app.query_one("#next"), app.query_one(Footer)):
            region = widget.region
            assert region.width > 0
            assert region.height > 0
            assert region.right <= size[0]
            assert region.bottom <= size[1]
        room = app.query_one("#next").content_size.width
        lines = said(app, "#next").splitlines()[1:-1]
        assert all(len(line) <= room for line in lines), "bars end where their panel does"

    drive(run, size, script)


@SIZES
def test_arrow_keys_go_to_a_cell_and_its_slices_are_there(language_run, size):
    async def script(app, pilot):
        await press(app, pilot, "ctrl+home", "home", "down", "right")
        assert app.place == (1, 1)
        matrix, position = app.place
        wanted = app.exploration.labelled(app.exploration.slices(app.view, matrix, position))
        assert app.listed == wanted
        table = app.query_one("#slices", DataTable)
        assert table.row_count == len(wanted) > 0
        cells = [str(cell) for cell in table.get_row_at(0)]
        assert cells[:2] == ["●", f":{wanted[0].slice.rpartition(':')[2]}"]
        assert repr(wanted[0].reads[0])[1:-1] in cells[5]
        assert f"{app.view.matrices[1]} at '{app.view.pieces[1]}', position 1: {len(wanted)} active" in said(
            app, "#place"
        )

    drive(language_run, size, script)


@SIZES
def test_a_slice_that_is_switched_off_moves_the_probabilities(language_run, size):
    async def script(app, pilot):
        before = app.next_tokens
        assert before.kl == 0
        await press(app, pilot, "tab", "space")
        first = app.listed[0].slice
        assert app.off == [first]
        assert app.next_tokens == app.exploration.next_tokens(app.view, [first])
        assert app.next_tokens.kl > 0
        assert str(app.query_one("#slices", DataTable).get_cell_at((0, 0))) == "○"
        assert said(app, "#off") == f"off (1): {first}"
        answer = next(one for one in app.next_tokens.tokens if one.answer)
        assert f"{answer.before:.3f} {answer.after:.3f}" in said(app, "#next")
        await press(app, pilot, "m")
        assert app.next_tokens == app.exploration.next_tokens(app.view, [first], "ablate")
        await press(app, pilot, "a")
        assert app.off == [first, *(one.slice for one in app.listed if one.slice != first)]
        await press(app, pilot, "a")
        assert app.off == []
        await press(app, pilot, "space", "r")
        assert (app.off, said(app, "#off")) == ([], "all slices are on")
        assert app.next_tokens.kl == 0

    drive(language_run, size, script)


def test_another_text_is_typed(toy_run):
    async def script(app, pilot):
        await press(app, pilot, "t", *"3 s 1 4 s", "enter")
        assert list(app.view.pieces) == ["3", "s", "1", "4", "s"]
        assert said(app, "#title") == "your text: 3 s 1 4 s"
        assert len(app.query_one("#map", DataTable).columns) == 5
        assert app.focused is app.query_one("#map")
        await press(app, pilot, "t", *"3 x", "enter")  # no token of the toy
        assert list(app.view.pieces) == ["3", "s", "1", "4", "s"]
        assert any("no token" in one.title for one in app._notifications)
        await press(app, pilot, "n")
        assert app.view.number == 1
        await press(app, pilot, "p")
        assert app.view.number == len(app.exploration.own.texts)

    drive(toy_run, (80, 24), script)


def test_what_is_off_is_written_as_an_edit_script(language_run, tmp_path):
    async def script(app, pilot):
        await press(app, pilot, "r", "w")  # nothing is off
        assert not app.query_one("#line", Input).has_class("shown")
        await press(app, pilot, "space", "w", "enter")
        await press(app, pilot, "a", "w", "enter")
        app.sets = [app.listed[0].slice], app.off

    async def written(app, pilot):
        await script(app, pilot)
        read, _ = load_script(tmp_path / "edits.toml")
        assert [edit.name for edit in read.edit] == ["explored", "explored 2"]
        assert tuple(edit.slices for edit in read.edit) == app.sets
        (tmp_path / "edits.toml").write_text("not = 'a script'")
        await press(app, pilot, "w", "enter")
        assert any("edits.toml" in one.title and one.severity == "error" for one in app._notifications)
        assert (tmp_path / "edits.toml").read_text() == "not = 'a script'"

    drive(language_run, (80, 24), written, folder=tmp_path)


def test_slices_may_be_off_at_first_and_the_screen_light(language_run):
    off = [f"{language_run.matrices[0]}:0"]

    async def script(app, pilot):
        assert app.next_tokens.off == off
        await press(app, pilot, "d")
        assert app.theme == "textual-light"
        await press(app, pilot, "t", "escape")
        assert app.focused is app.query_one("#map")

    drive(language_run, (80, 24), script, off)


def test_the_command_says_what_it_needs_and_gives_json(toy_run, tmp_path, monkeypatch, capsys):
    spd = spd_here(monkeypatch, capsys)
    code, _, err = spd("explore", tmp_path)
    assert code == 2
    one_line(err, "needs a terminal")
    monkeypatch.setattr("spdcli.commands.explore.find_spec", lambda name: None)
    code, _, err = spd("explore", tmp_path)
    assert code == 1
    one_line(err, "pip install 'spd-cli[explore]'")
    toy_run.save(tmp_path / "run")
    address = f"{toy_run.matrices[0]}:0"
    code, out, _ = spd("explore", tmp_path / "run", "--prompt", "3 s 1 4 s", "--slice", address, "--json")
    import json

    said = json.loads(out)
    assert code == 0
    assert (said["schema"], said["tokens"], said["next"]["off"]) == (
        "spd.explore/2",
        ["3", "s", "1", "4", "s"],
        [address],
    )
    assert list(said["importance"]) == toy_run.matrices
    second = json.loads(spd("explore", tmp_path / "run", "--prompt", "2", "--json")[1])
    assert (second["number"], second["text"]) == (2, toy_run.explore().own.texts[1])
