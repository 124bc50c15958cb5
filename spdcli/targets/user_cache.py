"""What is made once and kept in the user's cache: whole or not at all, whoever else makes it at the same time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from spdcli.disk import beside, settle
from spdcli.errors import SpdError


def cache_folder(kind: str) -> Path:
    """Where things of a `kind` are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spd" / kind


def cached(kind: str, name: str, fill: Callable[[Path], None]) -> Path:
    """The folder `name` of a `kind` in the cache, filled by `fill` now if it is not there.

    Of two processes that fill it at once, the first to finish wins. SpdError where the cache cannot be written.
    """
    place = cache_folder(kind) / name
    if place.is_dir():
        return place
    try:
        with beside(place) as folder:
            folder.mkdir()
            fill(folder)
            settle(folder)
            publish(folder, place)
    except OSError as error:
        raise SpdError(f"the cache cannot be written: {error}", "set XDG_CACHE_HOME to a directory you own") from error
    return place


def publish(folder: Path, place: Path) -> None:
    """Renames `folder` to `place`, unless another process put the same thing there first."""
    try:
        folder.rename(place)
    except OSError:
        if not place.is_dir():
            raise
