"""How commands open a run: with something to see meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spdcli.console import Console

if TYPE_CHECKING:
    from spdcli.runs.loading import LoadedRun


def opened(console: Console, run: Path, device: str | None) -> LoadedRun:
    """The run at a path; with `-v` it is described."""
    from spdcli.runs.loading import load

    with console.progress(f"opening {run}"):
        loaded = load(run, device)
    console.debug(str(loaded))
    return loaded
