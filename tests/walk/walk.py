"""README.md walked as somebody new would: a fresh clone, an environment of its own, every command as it is printed.

    python -m walk.walk                       in an empty folder: clones into ./clone, and goes on there
    python -m walk.walk --without 'make test'

Prints each command, how long it took, and how it ended; the exit code is 1 where one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from printed import ROOT, blocks, commands_and_output

TYPED_BY_ALL = ("make", "spd")  # pip and git stand in README.md for those who have no clone
PYTHON = "python, the block of README.md"


@dataclass(frozen=True)
class Step:
    """A command of the walk: its wall and processor `seconds`, its exit code, and the last line that it printed."""

    command: str
    seconds: float
    processor_seconds: float
    exit: int
    last: str

    def __str__(self) -> str:
        return f"{self.seconds:7.1f} s  exit {self.exit}  {self.command}"


def steps_of(readme: str) -> list[tuple[str, list[str]]]:
    """What README.md has people type, in order: each as it stands there, and as the words of a command."""
    steps: list[tuple[str, list[str]]] = []
    for block in blocks(readme):
        if block.language == "python":
            steps.append((PYTHON, ["python", "-c", block.text]))
        elif block.language in ("bash", "console"):
            typed = [shlex.split(line, comments=True) for line in commands_and_output(block)[0]]
            steps += [(shlex.join(words), words) for words in typed if words[0] in TYPED_BY_ALL]
    return steps


def walk(folder: Path, without: list[str], report: Callable[[Step], object]) -> list[Step]:
    """Clones what is committed into `folder`/clone and takes every step there; `report` is given each once done."""
    clone = folder / "clone"
    steps = [taken(f"git clone REPOSITORY {clone.name}", ["git", "clone", "--quiet", str(ROOT), str(clone)], folder)]
    report(steps[0])
    for printed, words in steps_of((clone / "README.md").read_text(encoding="utf-8")):
        if printed not in without:
            steps.append(taken(printed, words, clone))
            report(steps[-1])
    return steps


def taken(printed: str, words: list[str], folder: Path) -> Step:
    """One step in `folder`, with the programs of its environment, once there is one."""
    programs = os.pathsep.join((str(folder / ".venv" / "bin"), os.environ["PATH"]))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    started, before = time.monotonic(), os.times()
    command = ["env", *words]  # exit code 127 where there is no such program
    ended = subprocess.run(command, cwd=folder, env=environment | {"PATH": programs}, stdout=subprocess.PIPE, text=True)
    after = os.times()  # of children, with all that they started
    used = after.children_user + after.children_system - before.children_user - before.children_system
    lines = [line.strip() for line in ended.stdout.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return Step(printed, round(time.monotonic() - started, 1), round(used, 1), ended.returncode, last)


def main() -> int:
    """The command line; 1 where a step failed."""
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--without", action="append", default=[], metavar="COMMAND", help="a command to leave out")
    about.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = about.parse_args()
    steps = walk(Path.cwd(), options.without, lambda step: print(step, file=sys.stderr))  # noqa: T201
    if options.json:
        print(json.dumps({"schema": "spd.walk/1", "steps": [asdict(step) for step in steps]}))  # noqa: T201
    return int(any(step.exit for step in steps))


if __name__ == "__main__":
    sys.exit(main())
