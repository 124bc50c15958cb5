"""Streams that are closed, full or of another encoding, a directory that is gone, and signals that end a command."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import ROOT, one_line, spd_here

from spdcli.console import Console, Unheard
from spdcli.errors import UsageError
from spdcli.progress import Progress
from spdcli.recipe.overrides import parse_override
from spdcli.targets.prompts import require_unicode


def shell(line: str, folder: Path, **environment: str) -> tuple[int, bytes, bytes]:
    """Exit code, stdout and stderr of a line of the shell, in which `$spd` is the command."""
    variables = {"PYTHONPATH": str(ROOT), "spd": f"{sys.executable} -m spdcli", **environment}
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=os.environ | variables, capture_output=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("$spd recipe ls > /dev/full", "standard output: cannot be written: No space left on device"),
        ("$spd recipe ls --json > /dev/full", "standard output: cannot be written: No space left on device"),
        ("$spd --help > /dev/full", "No space left on device"),
        ("$spd recipe ls >&-", "standard output is closed: the answer has nowhere to go"),
        ("mkdir gone; cd gone; rmdir ../gone; $spd recipe ls", "the directory that the command runs in was removed"),
    ],
)
def test_what_cannot_be_delivered_is_one_line(tmp_path, line, said):
    code, _, err = shell(line, tmp_path)
    assert code in (1, 2)
    one_line(err.decode(), said)


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", "2> >(exit)"])
def test_notes_that_nobody_hears_stop_nothing(tmp_path, where):
    code, out, _ = shell(f"$spd recipe ls -v {where}", tmp_path)
    assert (code, out[:4]) == (0, b"gpt2")


def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path):
    """Otherwise what a library says on stderr would stand in it."""
    shell("$spd recipe cp gpt2 a.toml >&- 2>&- <&-", tmp_path)
    assert (tmp_path / "a.toml").read_bytes() == (ROOT / "recipes" / "gpt2.toml").read_bytes()
    code = "import os; from spdcli.cli import _open_standard_streams; _open_standard_streams(); print(os.dup(0))"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{code}' 2>&- <&-"], cwd=ROOT, capture_output=True, check=True
    )
    assert int(done.stdout) > 2


def test_what_a_terminal_cannot_show_is_escaped(tmp_path):
    (tmp_path / "a.toml").write_text("# Größe ☃\n", encoding="utf-8")
    code, out, err = shell("$spd recipe show a.toml", tmp_path, PYTHONIOENCODING="ascii")
    assert (code, out, err) == (0, b"# Gr\\xf6\\xdfe \\u2603\n", b"")


def test_what_is_not_utf_8_is_told(tmp_path):
    code, _, err = shell("$spd recipe check gpt2 --set $'name=\\xff'", tmp_path)
    assert code == 2
    one_line(err.decode(), "--set 'name=\\udcff': not text in UTF-8")
    with pytest.raises(UsageError, match=r"--with 'a\.b=.udcff': not text in UTF-8"):
        parse_override("a.b=\udcff", "--with")
    with pytest.raises(UsageError, match=r"the prompt 'golf .udcff' is not text in UTF-8"):
        require_unicode("golf \udcff")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_puts_away_what_it_began(monkeypatch, capsys, tmp_path, number):
    spd = spd_here(monkeypatch, capsys)
    monkeypatch.setattr("spdcli.commands.recipe._text", lambda path: signal.raise_signal(number))
    code, out, err = spd("recipe", "cp", "gpt2", tmp_path / "a.toml")
    assert (code, out, err.splitlines()[0]) == (130, "", "interrupted: stopped; what is written is whole")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == signal.SIG_DFL


class Gone(io.StringIO):
    """A terminal that hung up."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        self.write("")

    def isatty(self) -> bool:
        return True


def test_a_terminal_that_hung_up_stops_no_work(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setenv("TERM", "xterm")
    console, done = Console(), []
    with console.progress() as report:
        report(Progress("working", 1, 2))
        console.warn("a warning")
        done.append(1)
    assert done == [1]
    assert Unheard(sys.stderr).isatty()
