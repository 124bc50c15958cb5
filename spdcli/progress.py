"""What long work tells while it goes on: functions take a `Report`, and say nothing by themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One thing to tell. With a `total`, `text` is how things stand after `done` of so many steps, and the next one
    replaces it; without one it is a note, or a `warning`, that stays.

    `str()` is a line for people, so that `print` is a `Report`.
    """

    text: str
    done: int = 0
    total: int = 0
    warning: bool = False

    def __str__(self) -> str:
        if self.total:
            return f"{self.done}/{self.total}  {self.text}"
        return f"warning: {self.text}" if self.warning else self.text


Report = Callable[[Progress], object]


def silent(progress: Progress) -> None:
    """The `Report` of who wants to hear nothing."""
