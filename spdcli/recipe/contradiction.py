"""Settings of a recipe that cannot be together, as what the rules tell. Knows neither torch nor pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Contradiction(NamedTuple):
    """Settings that are fine one by one and cannot be together."""

    keys: tuple[str, ...]  # dotted; the first is the one that the message starts with
    message: str


Sections = Mapping[str, Any]


SHOWN = 60  # characters of a value in a line


def shortened(text: str) -> str:
    """A text, or its beginning where it would fill a line."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def shown(value: Any) -> str:
    """A value as one would write it, short enough for a line."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        value = value[:SHOWN]
    return shortened(repr(value) if isinstance(value, str | int | float | list) else str(value))
