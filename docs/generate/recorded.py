"""Recorded results: what `docs/results.toml` lists, and the JSON file that a command left of each.

A result is never typed. `docs/record.py NAME` runs its command with `--json` and writes
`docs/results/NAME.json`: `{name, command, commit, date, version, machine, seconds, processor_seconds, peak_mib, exit,
figures, result}`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
RESULTS = DOCS / "results"
LIST = DOCS / "results.toml"


@dataclass(frozen=True)
class Result:
    """One result that the documents show: the command that makes it, and on which page it stands.

    `after` are results whose commands must have run in the same folder, `files` those of `docs/` that must lie in
    `docs/` there. `figures` are files that the command writes and the page shows. `shows` is what a reader learns from
    it; fields in braces are numbers of the result, as in `{metrics[recon]:.1e}`.
    """

    name: str
    page: str
    title: str
    command: str
    shows: str = ""
    after: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """One page of results."""

    name: str
    title: str
    about: str


@dataclass(frozen=True)
class Recording:
    """What one run of a result's command left. `processor_seconds` are those of all its threads and processes, and
    `peak_mib` is the most memory that one process held; None where an older recording does not say."""

    name: str
    command: str
    commit: str
    date: str
    version: str
    machine: Mapping[str, Any]
    seconds: float
    exit: int
    figures: tuple[str, ...]
    result: Mapping[str, Any]
    processor_seconds: float | None = None
    peak_mib: int | None = None


@cache
def results() -> dict[str, Result]:
    """Every result of `docs/results.toml`, by its name, in the order of the pages."""
    entries = [Result(**with_tuples(entry)) for entry in _list()["result"]]
    return {entry.name: entry for entry in entries}


@cache
def pages() -> tuple[Page, ...]:
    """The pages of results, in order."""
    return tuple(Page(**entry) for entry in _list()["page"])


def recording(name: str) -> Recording | None:
    """What was recorded of the result `name`; None where its command has not been run yet."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    entry = json.loads(path.read_text(encoding="utf-8"))
    return Recording(**{**entry, "figures": tuple(entry["figures"])})


def sentence(result: Result, recorded: Recording) -> str:
    """What the result shows, with its numbers filled in."""
    return result.shows.format_map({**recorded.result, "recorded": vars(recorded)})


def with_tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a TOML file with tuples in the place of its lists, for a frozen record."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


@cache
def _list() -> dict[str, Any]:
    return tomllib.loads(LIST.read_text(encoding="utf-8"))
