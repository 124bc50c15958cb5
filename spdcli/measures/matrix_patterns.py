"""Matrices chosen by patterns of their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from spdcli.errors import UsageError


def matrices_like(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The matrices among a run's `names` that one of `patterns` matches; UsageError where there is none."""
    like = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not like:
        raise UsageError(
            f"no decomposed matrix matches {' or '.join(repr(p) for p in patterns)}",
            f"the run has {', '.join(names[:6])}{' …' if len(names) > 6 else ''}",
        )
    return like
