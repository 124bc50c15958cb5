"""A walk through README.md, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generate.markdown import duration, joined, table


def walk(data: Mapping[str, Any]) -> str:
    """`spd.walk/1`: a row a command, in the order of README.md."""
    steps = data["steps"]
    rows = [
        [f"`{step['command']}`", duration(step["seconds"]), duration(step["processor_seconds"]), step["exit"]]
        for step in steps
    ]
    words = f"{len(steps)} steps, {sum(step['exit'] != 0 for step in steps)} of them failed."
    return joined([table(["command", "time", "processor time", "exit code"], rows), words])
