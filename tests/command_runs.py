"""What tests of commands ask of a run's directory, and how they interrupt what writes it."""

from __future__ import annotations

import math
import os
import signal
from contextlib import contextmanager
from pathlib import Path

from spdcli.runs.directory import DECOMPOSITION, RunDirectory


def bits(run: Path) -> bytes:
    return (run / DECOMPOSITION).read_bytes()


def steps(run: Path) -> list[int]:
    return [record["step"] for record in RunDirectory(run).metrics()]


def trained(run: Path) -> list[dict]:
    """The metrics but for the time they took."""
    return [{key: value for key, value in r.items() if key != "seconds"} for r in RunDirectory(run).metrics()]


def line_of(path: Path, text: str) -> int:
    return next(n for n, line in enumerate(path.read_text().splitlines(), 1) if line.startswith(text))


def interrupt_after(monkeypatch, step: int, *numbers: int, name: str = "add_metrics") -> None:
    """Sends the signals `numbers` while the record of `step` is written, or in whatever else `name` does."""
    write = getattr(RunDirectory, name)

    def press(run, *arguments):
        write(run, *arguments)
        if run.metrics()[-1]["step"] == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(RunDirectory, name, press)


@contextmanager
def heard(number):
    """Python's own answer to Ctrl-C, which a shell takes from what it starts in the background."""
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def check_numbers(value, path=""):
    """Every number of a JSON answer is finite; only a standard error may be null."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        here = f"{path}.{key}"
        if isinstance(inner, dict | list):
            check_numbers(inner, here)
        elif isinstance(inner, int | float):
            assert math.isfinite(inner), here
        else:
            assert isinstance(inner, str) or here.startswith(".standard_error"), here
