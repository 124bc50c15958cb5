"""What long work tells while it goes on: functions take a `Report`, and say nothing by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar


@dataclass(frozen=True)
class Progress:
    """One thing to tell. With a `total`, `text` is how things stand after `done` of so many steps, and the next one
    replaces it; without one it is a note, or a `warning`, that stays.

    `numbers` are what matters most of how things stand, the first first; `terms` are what a loss is made of, by name,
    and `groups` the mean active slices (L0) at a position, by kind of matrix. With `step_only` another step is done,
    and the rest is as it was.

    `str()` is a line for people, so that `print` is a `Report`.
    """

    text: str
    done: int = 0
    total: int = 0
    warning: bool = False
    numbers: Mapping[str, float] = field(default_factory=dict)
    terms: Mapping[str, float] = field(default_factory=dict)
    groups: Mapping[str, float] = field(default_factory=dict)
    step_only: bool = False

    def __str__(self) -> str:
        if self.total:
            return f"{self.done}/{self.total}  {self.text}"
        return f"warning: {self.text}" if self.warning else self.text


Report = Callable[[Progress], object]
Item = TypeVar("Item")


def silent(progress: Progress) -> None:
    """The `Report` of who wants to hear nothing."""


def counted(items: Sequence[Item], text: str, report: Report) -> Iterator[Item]:
    """`items`, one after the other, of which `report` hears how many are done: before the first, and after each."""
    for done, item in enumerate(items):
        report(Progress(text, done, len(items)))
        yield item
    if items:
        report(Progress(text, len(items), len(items)))


def without_steps(report: Report) -> Report:
    """`report`, which is told of every record and note, but not of every step."""

    def told(progress: Progress) -> object:
        return None if progress.step_only else report(progress)

    return told
