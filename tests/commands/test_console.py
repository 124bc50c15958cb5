"""What goes to stdout and what to stderr, in every mode."""

from __future__ import annotations

import io
import json
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.table import Table

from spdcli.console import Console
from spdcli.errors import Interrupted, RecipeError, RecipeProblem, SpdError
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
    with console.live() as live:
        live.update("loss 0.5 [x]", 10, 100)
        live.update("loss 0.4 [x]", 20, 100)
        live.update("second part", 1, 5)


@pytest.mark.parametrize("options", [{}, {"json": True}, {"verbose": True}])
def test_no_live_line_off_a_terminal(options: dict[str, bool], capsys: pytest.CaptureFixture[str]) -> None:
    work(Console(**options))
    assert tuple(capsys.readouterr()) == ("", "")


def test_no_live_line_when_quiet_or_on_a_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    work(Console(quiet=True))
    monkeypatch.setenv("TERM", "dumb")
    work(Console())
    assert terminal.getvalue() == ""


def test_the_live_line_shows_the_work_and_goes_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    with Console().live() as live:
        live.update("first part", 10, 100)
        live.update("second part [x] " + "term 1.0 " * 20, 1, 5)
    lines = terminal.getvalue().replace("\r", "\n").split("\n")
    assert any(re.search(r"1/5 second part \[x\] term 1.0.*…", line) for line in lines)
    assert any("10/100 first part" in line for line in lines)
    assert terminal.getvalue().count("\n") == 1, "one line, written over and over, and left at the end to be erased"
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is erased
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
