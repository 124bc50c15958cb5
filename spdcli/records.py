"""Results as JSON: the one place where a record, a tensor or a path becomes what `json` can write.

A record is a frozen dataclass, and an object in JSON. A field that is `ABSENT` was never set and is left out of it
(None is null); a field whose metadata is of `spread` is a mapping whose entries become fields of the record itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

SPREAD = "spread"  # of a field's metadata


class Absent(Enum):
    """The type of `ABSENT`, which is false."""

    ABSENT = "absent"

    def __bool__(self) -> Literal[False]:
        return False


ABSENT = Absent.ABSENT


def spread(name: str) -> dict[str, str]:
    """Metadata of a field whose entries stand beside the record's other fields in JSON, called `name.format(key)`.

    >>> from dataclasses import dataclass, field
    >>> @dataclass(frozen=True)
    ... class Point:
    ...     mean: dict[str, float] = field(metadata=spread("mean_{}"))
    ...     error: float | Absent = ABSENT
    >>> plain(Point({"x": 1.0, "y": 2.0}))
    {'mean_x': 1.0, 'mean_y': 2.0}
    """
    return {SPREAD: name}


def plain(value: Any) -> Any:
    """`value` in the types of JSON: null for what is not finite, lists for arrays and sets, text for paths."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return _record(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return [plain(item) for item in sorted(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _record(value: Any) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for one in fields(value):
        content = getattr(value, one.name)
        if SPREAD in one.metadata:
            entries |= {one.metadata[SPREAD].format(key): plain(item) for key, item in content.items()}
        elif content is not ABSENT:
            entries[one.name] = plain(content)
    return entries
