"""Settings of a recipe that cannot be together, as what the rules tell. Knows neither torch nor pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Contradiction(NamedTuple):
    """Settings that are fine one by one and cannot be together."""

    keys: tuple[str, ...]  # dotted; the first is the one that the message starts with
    message: str


Sections = Mapping[str, Any]


def shown(value: Any) -> str:
    """A value as one would write it, short enough for a line."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str | int | float | list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
