"""What goes to stdout and what to stderr, in every mode."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.table import Table

from spdcli.console import Console, live
from spdcli.errors import Interrupted, RecipeError, RecipeProblem, SpdError
from spdcli.progress import Progress
from spdcli.records import plain


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def speak(console: Console) -> None:
    """One of everything."""
    console.note("a note")
    console.debug("a detail")
    console.warn("a warning")
    console.show({"schema": "x/1", "n": 1}, "a table")
    console.result("run")


@pytest.mark.parametrize(
    ("options", "out", "err"),
    [
        ({}, "a table\nrun\n", "a note\nwarning: a warning\n"),
        ({"verbose": True}, "a table\nrun\n", "a note\na detail\nwarning: a warning\n"),
        ({"quiet": True}, "run\n", "warning: a warning\n"),
        ({"json": True}, '{"schema": "x/1", "n": 1}\n', "a note\nwarning: a warning\n"),
        ({"json": True, "quiet": True}, '{"schema": "x/1", "n": 1}\n', "warning: a warning\n"),
    ],
)
def test_what_each_mode_prints(
    options: dict[str, bool], out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    speak(Console(**options))
    assert tuple(capsys.readouterr()) == (out, err)


def test_json_is_one_object_whose_odd_numbers_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    nan, infinity = float("nan"), float("inf")
    Console(json=True).show({"a": [nan, (1.5, -infinity)], "b": {"c": infinity}, 3: np.array([1.0, nan])})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"a": [None, [1.5, None]], "b": {"c": None}, "3": [1.0, None]}


def test_a_second_object_is_a_mistake_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(json=True)
    console.show({})
    with pytest.raises(AssertionError):
        console.show({})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32("inf"), None),
        (np.int64(3), 3),
        (Path("a/b"), "a/b"),
        ({"b", "a"}, ["a", "b"]),
        (OrderedDict(x=(True, None)), {"x": [True, None]}),
    ],
)
def test_plain_values(value: Any, expected: Any) -> None:
    assert plain(value) == expected


def test_tensors_are_plain_lists() -> None:
    import torch

    assert plain({"t": torch.tensor([[1.0, float("nan")]])}) == {"t": [[1.0, None]]}


def test_what_has_no_json_is_refused() -> None:
    with pytest.raises(TypeError, match="object has no form in JSON"):
        plain(object())


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("token")
    table.add_row("[bold]:smile:")
    console = Console()
    console.show({}, "[losses] :smile: 1" + " long" * 60, table)
    console.note("[losses] :smile:" + " long" * 60)
    console.error(SpdError("x.toml:3: [losses] recon" + " long" * 60, "[hint] :smile:"))
    out, err = capsys.readouterr()
    assert out.startswith("[losses] :smile: 1" + " long" * 60 + "\n")
    assert "[bold]:smile:" in out
    assert err == (
        "[losses] :smile:"
        + " long" * 60
        + "\nerror: x.toml:3: [losses] recon"
        + " long" * 60
        + "\nhint: [hint] :smile:\n"
    )


def test_every_mistake_of_a_recipe_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    problems = [RecipeProblem("x.toml", 3, "a", "first"), RecipeProblem("x.toml", 4, "b", "second", column=7)]
    Console(quiet=True).error(RecipeError(problems, "look"))
    assert capsys.readouterr().err == "error: x.toml:3: first\nerror: x.toml:4:7: second\nhint: look\n"


def test_an_interruption_is_not_called_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(Interrupted("at step 3", "go on with --resume"))
    assert capsys.readouterr().err == "interrupted: at step 3\nhint: go on with --resume\n"


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def error_line(**environment: str) -> str:
        monkeypatch.setattr(sys, "stderr", Terminal())
        for name in ("NO_COLOR", "TERM", "COLORTERM", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        Console().error(SpdError("no"))
        return sys.stderr.getvalue()  # type: ignore[attr-defined]

    assert "\x1b[1;31m" in error_line(TERM="xterm-256color")
    assert "31m" not in error_line(TERM="xterm-256color", NO_COLOR="1")


def work(console: Console) -> None:
    with console.progress("beginning") as report:
        report(Progress("loss 0.5 [x]", 10, 100))
        report(Progress("loss 0.4 [x]", 20, 100))
        report(Progress("second part", 1, 5))


@pytest.mark.parametrize("options", [{}, {"json": True}, {"verbose": True}])
def test_short_work_is_silent_off_a_terminal(options: dict[str, bool], capsys: pytest.CaptureFixture[str]) -> None:
    work(Console(**options))
    assert tuple(capsys.readouterr()) == ("", "")


@pytest.mark.parametrize(("quiet", "lines"), [(False, True), (True, False)])
def test_long_work_is_never_silent_off_a_terminal(
    quiet: bool, lines: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert live.SILENCE < 30
    monkeypatch.setattr(live, "SILENCE", 0.02)
    with Console(quiet=quiet).progress("opening run") as report:
        time.sleep(0.1)
        report(Progress("all of it", 3, 9, numbers={"loss": 0.25, "active": 12.0}))
        time.sleep(0.1)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("opening run, 0:00 so far\n" in err) is lines
    assert bool(re.search(r"^3/9  loss 0\.25  active 12$", err, re.MULTILINE)) is lines
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_no_view_when_quiet_or_on_a_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    work(Console(quiet=True))
    monkeypatch.setenv("TERM", "dumb")
    work(Console())
    assert terminal.getvalue() == ""


def to_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Terminal:
    """Standard error from here on: pytest takes it back when a fixture sets it."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_the_view_begins_at_once_moves_and_goes_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = to_terminal(monkeypatch, 60)
    with Console().progress("opening run") as report:
        assert "… opening run 0:00" in terminal.getvalue()
        report(Progress("second part [x] " + "term 1.0 " * 20, 1, 5))
    lines = terminal.getvalue().replace("\r", "\n").split("\n")
    assert any(re.search(r"1/5 second part \[x\] term 1.0.*…", line) for line in lines)
    assert terminal.getvalue().endswith("\x1b[2K")  # the last line is erased
    assert capsys.readouterr().out == ""


HOSTILE = "a\x1b[2Jb\x07\x9b1mc\u202ed\x7f\r"
TAME = r"a\x1b[2Jb\x07\x9b1mc\u202ed\x7f\r"


def test_control_characters_reach_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich drops a few of them by itself; none passes as it is."""
    console = Console(verbose=True)
    table = Table("name", title=HOSTILE)
    table.add_row(HOSTILE)
    console.show({}, HOSTILE, table)
    console.note(HOSTILE)
    console.debug(HOSTILE)
    console.warn(HOSTILE)
    console.error(SpdError(HOSTILE, HOSTILE))
    out, err = capsys.readouterr()
    for text in (out, err):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert out.count(r"\x1b[2J") == 3
    assert err.count(TAME) == 5


def test_a_program_gets_names_exactly_and_a_terminal_escaped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Console().result(HOSTILE)
    assert capsys.readouterr().out == f"{HOSTILE}\n"
    Console(json=True).show({"name": HOSTILE})
    assert json.loads(capsys.readouterr().out) == {"name": HOSTILE}
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    Console().result(f"{HOSTILE}\tline\nnext")
    assert terminal.getvalue() == f"{TAME}\tline\nnext\n"


def test_a_mistake_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(RecipeError([RecipeProblem("a.toml", 1, "x", "unknown key 'x\nerror: all is lost'")]))
    assert capsys.readouterr().err == "error: a.toml:1: unknown key 'x\\nerror: all is lost'\n"


NUMBERS = {"loss": 15.27, "recon": 0.0713, "active": 396.2, "GiB": 1.25}
TERMS = {"recon": 0.0713, "minimality": 301.0}


@pytest.mark.parametrize("columns", [80, 120])
def test_the_numbers_that_matter_are_on_the_first_line(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = to_terminal(monkeypatch, columns)
    clock = itertools.count()
    monkeypatch.setattr(live, "monotonic", lambda: float(next(clock)))
    with Console().progress("opening run") as report:
        for step in range(1, 21):
            report(Progress("", step, 200, numbers=NUMBERS, terms=TERMS | {"recon": 1 / step}, groups={"up": 3.25}))
        report(Progress("", 21, 200, step_only=True))
    screen = terminal.getvalue().rpartition("21/200")[2]
    first, *below = screen.splitlines()
    for number in ("loss 15.3", "recon 0.0713", "active 396", "left", "steps/s"):
        assert number in first
    assert [line.split()[0] for line in below[:3]] == ["recon", "minimality", "L0"]
    assert below[0].rstrip().endswith("▁")
    assert "3.25" in below[2]
    assert all(len(line.rstrip()) <= columns for line in [first, *below])


def test_time_left_is_of_the_steps_of_this_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(live, "monotonic", lambda: now[0])
    standing = live.Standing("opening")
    now[0] = 150.0
    standing.update(Progress("training", 10, 110))  # goes on from step 10
    assert standing.left == ""
    now[0] = 170.0
    standing.update(Progress("training", 20, 110))
    assert (standing.left, standing.rate) == ("3:00 left", "2.0 s/step")
    standing.update(Progress("measuring", 0, 4))
    assert standing.line() == "0/4  measuring"


def test_a_sparkline_is_logarithmic_where_it_spans_orders() -> None:
    assert live.sparkline([1.0, 1e3, 1e6]) == "▁▅█"
    assert live.sparkline([1.0, 5.0, 9.0]) == "▁▅█"
    assert live.sparkline([float(n) for n in range(1000)], 8) == "▁▂▃▄▅▅▆█"
    assert live.sparkline([1.0, math.nan]) == ""
