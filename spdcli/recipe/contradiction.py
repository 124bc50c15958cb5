"""Settings of a recipe that cannot be together, as what the rules tell. Knows neither torch nor pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Contradiction(NamedTuple):
    """Settings that are fine one by one and cannot be together."""

    keys: tuple[str, ...]  # dotted; the first is the one that the message starts with
    message: str


Sections = Mapping[str, Any]
