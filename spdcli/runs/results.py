"""What was measured of a run and lies beside it as JSON: whole, and of the decomposition that the run has now.

Training that goes on, or another run's file put there, would have old numbers pass for new ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spdcli.disk import read_object, write_json
from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import Missing, SpdError
from spdcli.files import checksum, checksum_of_file
from spdcli.progress import Progress, Report
from spdcli.records import plain
from spdcli.runs.directory import DECOMPOSITION, RunDirectory

CHECKSUM = "checksum"  # of all that a result says besides


def write_result(run: RunDirectory, decomposition: Decomposition, name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Write `data`, measured of `decomposition`, into the file `name` of a run's directory; returns what it says."""
    result = sealed({**plain(data), "decomposition": checksum(decomposition.state_dict())})
    write_json(run / name, result)
    return result


def sealed(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result with the checksum of what it says now."""
    said = {key: value for key, value in result.items() if key != CHECKSUM}
    return {**said, CHECKSUM: _checksum(said)}


def checked_result(run: RunDirectory, name: str, again: str) -> dict[str, Any]:
    """The result in the file `name` of a run's directory; Missing where there is none, SpdError where it is damaged or
    of another decomposition, with `again` as the hint."""
    path = run / name
    try:
        result = read_object(path)
    except Missing:
        raise
    except SpdError as error:
        raise SpdError(error.message, again) from error
    if result.get(CHECKSUM) != _checksum({key: value for key, value in result.items() if key != CHECKSUM}):
        raise SpdError(f"{path}: damaged, or of an older spd: it does not hold what was written", again)
    require_own(path, result.get("decomposition"), run.path, again)
    return result


def kept_result(run: RunDirectory, name: str, report: Report) -> dict[str, Any]:
    """As `checked_result`; empty where there is none, or, with a warning, none that can be used."""
    try:
        return checked_result(run, name, "")
    except Missing:
        return {}
    except SpdError as error:
        report(Progress(f"{error.message}; it is measured again", warning=True))
        return {}


def require_own(path: Path, decomposition: object, run: Path, again: str) -> None:
    """SpdError unless `path` was measured of the `decomposition`, by its checksum, that the directory `run` has now.

    A directory that has none has nothing to compare.
    """
    now = run / DECOMPOSITION
    if now.exists() and decomposition != checksum_of_file(now):
        which = "another" if decomposition else "no known"
        raise SpdError(f"{path}: of {which} decomposition, not of the {DECOMPOSITION} that is there now", again)


def _checksum(said: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()
