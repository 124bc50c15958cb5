"""The explorer's screen: a map of importance, the slices of a cell, and what the model says next without some of them.

What is slow (the model) runs in threads, one at a time; the newest request wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import ClassVar

from textual import on, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import DataTable, Footer, Input, Static
from textual.worker import get_current_worker

from spdcli.edits.script import add_edit
from spdcli.errors import SpdError
from spdcli.explorer.exploration import Exploration, NextTokens, TextView
from spdcli.explorer.features import FeatureExploration, OutputChanges
from spdcli.explorer.rendering import (
    OFF,
    ON,
    candidates,
    changed_outputs,
    cut_to,
    heat_cell,
    matrix_label,
    quoted,
    shown_token,
)
from spdcli.measures.inspection import SliceActivity

SCRIPT = "edits.toml"
OTHER_COLUMNS, LEAST_LABELS = 31, 12  # of the table of slices: its columns but for two of labels, and these at least
WIDE = 100  # columns from which the panels stand side by side
TYPE, WRITE = "text", "script"  # what the input line is for


class NextPanel(Static):
    """What the model says next, drawn anew when its place gets another size, as when it is first laid out."""

    def on_resize(self) -> None:
        if isinstance(self.app, Explorer) and self.app.next_tokens is not None:
            self.app.show_answer(self.app.next_tokens)


class Explorer(App[None]):
    """`spd explore`: `exploration` is what is looked at, `start` the first text, `script` where edits are written,
    `off` the addresses of slices that are off at first.

    Of a toy of sparse features the map has a row an input, and what follows the cursor are the toy's outputs."""

    CSS_PATH = "explorer.tcss"
    TITLE = "spd explore"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (WIDE, "-wide")]  # noqa: RUF012  # App declares no class variable
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "slice", "off/on"),
        Binding("a", "cell", "cell"),
        Binding("r", "reset", "all on"),
        Binding("m", "way", "meaning"),
        Binding("t", "type", "text"),
        Binding("n", "prompt(1)", "next"),
        Binding("p", "prompt(-1)", "previous", show=False),
        Binding("w", "write", "write"),
        Binding("d", "light", "light/dark", show=False),
        Binding("escape", "leave_line", "back", show=False),
        Binding("q", "quit", "quit"),
    ]

    def __init__(
        self, exploration: Exploration, start: TextView, script: Path = Path(SCRIPT), off: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.exploration = exploration
        self.view = start
        self.script = script
        self.way = next(iter(exploration.ways))
        self.off = list(off)
        self.purpose = TYPE
        self.listed: list[SliceActivity] = []
        self.next_tokens: NextTokens | OutputChanges | None = None
        self._model = Lock()

    def compose(self) -> ComposeResult:
        yield Static(id="title", markup=False)
        with Vertical(id="body"):
            with Vertical(id="tables"):
                yield DataTable(id="map", cursor_type="cell", cursor_background_priority="css")
                yield Static(id="place", markup=False)
                yield DataTable(id="slices", cursor_type="row", cursor_background_priority="css")
            yield NextPanel(id="next", markup=False)
        yield Static(id="off", markup=False)
        yield Input(id="line")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.show_text(self.view)
        self.map.focus()

    @property
    def map(self) -> DataTable:
        return self.query_one("#map", DataTable)

    @property
    def slice_table(self) -> DataTable:
        return self.query_one("#slices", DataTable)

    @property
    def place(self) -> tuple[int, int]:
        """The matrix and the position (or input) that the cursor is on."""
        row, column = self.map.cursor_row, self.map.cursor_column
        return (column, row) if self.of_features else (row, column)

    @property
    def of_features(self) -> bool:
        return isinstance(self.exploration, FeatureExploration)

    # --- a text ------------------------------------------------------------------------------------

    def show_text(self, view: TextView) -> None:
        """Fill the map; the cursor goes to its hottest cell, of a toy of sparse features in the row of its input."""
        self.view = view
        of = f"prompt {view.number} of {len(self.exploration.own.texts)}" if view.number else "your text"
        self.query_one("#title", Static).update(view.text if self.of_features else f"{of}: {view.text}")
        if view.note:
            self.notify(view.note, severity="warning")
        table, most = self.map, view.heat.max().item() or 1.0
        table.clear(columns=True)
        heat, labels, heads = view.heat, list(map(matrix_label, view.matrices)), list(map(shown_token, view.pieces))
        row, column = divmod(int(heat.argmax()), len(heads))
        if self.of_features:
            heat, labels, heads = heat.T, heads, labels
            row, column = view.position, int(heat[view.position].argmax())
        table.add_columns(*heads)
        for label, values in zip(labels, heat.tolist(), strict=True):
            table.add_row(*(heat_cell(value, math.sqrt(value / most)) for value in values), label=label)
        table.move_cursor(row=row, column=column)
        self.call_after_refresh(table.move_cursor, row=row, column=column)  # now that the table knows its height
        self.show_place()
        self.ask()

    @work(thread=True, exclusive=True, group="text")
    def read_text(self, text: str | int) -> None:
        """Look at a text of the user's own, or at one of the run's prompts, by its number."""
        self.call_from_thread(self.set_busy, True)
        try:
            with self._model:
                view = self.exploration.prompt(text) if isinstance(text, int) else self.exploration.typed(text)
        except SpdError as error:
            self.call_from_thread(self.complain, error)
        else:
            if not get_current_worker().is_cancelled:
                self.call_from_thread(self.show_text, view)
        finally:
            self.call_from_thread(self.set_busy, False)

    def set_busy(self, busy: bool) -> None:
        self.map.loading = busy

    def complain(self, error: SpdError) -> None:
        self.notify(error.hint or "", title=error.message, severity="error")

    # --- a cell ------------------------------------------------------------------------------------

    @on(DataTable.CellHighlighted, "#map")
    def show_place(self) -> None:
        """List the slices of the cell under the cursor: at once without labels, then with them."""
        matrix, position = self.place
        self.listed = self.exploration.slices(self.view, matrix, position)
        token = quoted(self.view.pieces[position])
        where = f"on input {self.view.pieces[position]}" if self.of_features else f"at {token}, position {position}"
        count = len(self.listed)
        said = f"{count} active slice{'' if count == 1 else 's'}" if count else "no slice is active"
        self.query_one("#place", Static).update(f"{self.view.matrices[matrix]} {where}: {said}")
        self.list_slices(keep=False)
        if self.listed:
            self.label(list(self.listed))
        if self.of_features and position != self.view.position:
            self.view = replace(self.view, position=position)
            self.ask()

    @work(thread=True, exclusive=True, group="labels")
    def label(self, slices: list[SliceActivity]) -> None:
        """Fill in what the listed slices read and promote."""
        with self._model:
            if get_current_worker().is_cancelled:
                return
            labelled = self.exploration.labelled(slices)
        if not get_current_worker().is_cancelled:
            self.call_from_thread(self.show_labels, labelled)

    def show_labels(self, labelled: list[SliceActivity]) -> None:
        if [one.slice for one in labelled] == [one.slice for one in self.listed]:
            self.listed = labelled
            self.list_slices(keep=True)

    def list_slices(self, keep: bool) -> None:
        """Fill the table of slices; with `keep` its cursor stays where it is."""
        table = self.slice_table
        row = table.cursor_row if keep else 0
        room = max((table.size.width - OTHER_COLUMNS) // 2, LEAST_LABELS)
        table.clear(columns=True)  # that are as wide as what they once held
        table.add_columns("", "slice", "g", "x·u", "*", "reads", "promotes")
        for one in self.listed:
            table.add_row(
                OFF if one.slice in self.off else ON,
                f":{one.slice.rpartition(':')[2]}",
                f"{one.importance:.2f}",
                f"{one.activation:+.2f}",
                "*" if one.unique else "",
                cut_to(" ".join(map(quoted, one.reads)), room),
                cut_to(" ".join(map(quoted, one.promotes)), room),
            )
        table.move_cursor(row=row)

    # --- slices off and on -------------------------------------------------------------------------

    def action_slice(self) -> None:
        """Switch the slice under the cursor off or on; on the map, the first of the cell."""
        row = self.slice_table.cursor_row if self.focused is self.slice_table else 0
        if 0 <= row < len(self.listed):
            self.switch([self.listed[row].slice])

    def action_cell(self) -> None:
        """Switch all slices of the cell off, or on if they all are off."""
        self.switch([one.slice for one in self.listed])

    def switch(self, slices: list[str]) -> None:
        """All of `slices` off; on if none of them was on."""
        if set(slices) <= set(self.off):
            self.off = [one for one in self.off if one not in slices]
        else:
            self.off += [one for one in slices if one not in self.off]
        self.list_slices(keep=True)
        self.ask()

    def action_reset(self) -> None:
        self.off = []
        self.list_slices(keep=True)
        self.ask()

    def action_way(self) -> None:
        """The next meaning of off."""
        ways = list(self.exploration.ways)
        self.way = ways[(ways.index(self.way) + 1) % len(ways)]
        self.ask()

    def ask(self) -> None:
        """Say what is off, and ask the model for its next tokens, or outputs."""
        off = f"off ({len(self.off)}): {', '.join(self.off)}" if self.off else "all slices are on"
        self.query_one("#off", Static).update(off)
        self.answer(self.view, list(self.off), self.way)

    @work(thread=True, exclusive=True, group="answer")
    def answer(self, view: TextView, off: list[str], way: str) -> None:
        """The next tokens, or outputs, without the slices `off`."""
        worker = get_current_worker()
        try:
            with self._model:
                if worker.is_cancelled:
                    return
                said = self.exploration.said(view, off, way)
        except SpdError as error:
            self.call_from_thread(self.complain, error)
        else:
            if not worker.is_cancelled:
                self.call_from_thread(self.show_answer, said)

    def show_answer(self, said: NextTokens | OutputChanges) -> None:
        self.next_tokens = said
        panel = self.query_one("#next", Static)
        meaning, size = self.exploration.ways[said.way].about, panel.content_size
        if isinstance(said, OutputChanges):
            panel.update(changed_outputs(said, meaning, size.width, size.height - 2))
        else:
            after = quoted(self.view.pieces[self.view.position])
            panel.update(candidates(said, after, meaning, size.width, size.height - 2))

    def on_resize(self) -> None:
        self.call_after_refresh(self.list_slices, keep=True)

    # --- texts and scripts -------------------------------------------------------------------------

    def action_prompt(self, step: int) -> None:
        """Another of the run's prompts; from a text of the user's own, the first."""
        here = self.view.position + 1 if self.of_features else self.view.number
        self.read_text(1 if self.view.number is None or here is None else here + step)

    def action_type(self) -> None:
        what = "features that are on" if self.of_features else "a text, fed whole"
        self.open_line(TYPE, "", f"{what}, as in {self.exploration.own.texts[0]}")

    def action_write(self) -> None:
        if not self.off:
            self.notify("switch slices off first: they are what is taken away", severity="warning")
        elif self.of_features:
            off = " ".join(f"--slice {one}" for one in self.off)
            self.notify(
                f"spd ablate {self.exploration.run.directory or 'RUN'} {off}", title="a toy has no edit scripts"
            )
        else:
            self.open_line(WRITE, str(self.script), "an edit script, to add this edit to")

    def open_line(self, purpose: str, value: str, hint: str) -> None:
        self.purpose, line = purpose, self.query_one("#line", Input)
        line.value, line.placeholder = value, hint
        line.border_title = purpose
        line.add_class("shown")
        line.focus()

    def action_leave_line(self) -> None:
        self.query_one("#line", Input).remove_class("shown")
        self.map.focus()

    @on(Input.Submitted, "#line")
    def submitted(self, event: Input.Submitted) -> None:
        self.action_leave_line()
        if self.purpose == TYPE:
            self.read_text(event.value)
        elif event.value.strip():
            self.write(Path(event.value.strip()).expanduser())

    def write(self, path: Path) -> None:
        """Add what is off to an edit script, as an edit that suppresses it."""
        try:
            name = add_edit(path, self.off)
        except SpdError as error:
            self.complain(error)
        else:
            self.script = path
            self.notify(
                f"spd suppress {self.exploration.run.directory or 'RUN'} --script {path}",
                title=f"{name!r} is in {path}",
            )

    def action_light(self) -> None:
        self.theme = "textual-light" if self.theme == "textual-dark" else "textual-dark"
