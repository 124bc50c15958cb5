"""What the methods of a run are called with: numbers and names that are checked, and which facts are meant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from spdcli.edits.facts_file import Facts, load_facts
from spdcli.errors import UsageError
from spdcli.runs.subject import Subject

BUILTIN_FACTS = "builtin"  # those that come with spd
FactsSource = str | Path | None


def require_at_least(least: int, **numbers: int) -> None:
    """UsageError for a number that is smaller than `least`, by the name that it was passed as."""
    for name, number in numbers.items():
        if number < least:
            raise UsageError(f"{name}={number}: expected at least {least}")


def require_one_of(table: Mapping[str, object], name: str) -> str:
    """`name`; UsageError where it is no key of `table`."""
    if name not in table:
        raise UsageError(f"{name!r}: expected one of {', '.join(table)}")
    return name


def facts_beside(subject: Subject, facts: FactsSource) -> Facts | None:
    """The facts that are meant: those that come with spd, of which the toy knows none, or those of a file."""
    if facts is None or (facts == BUILTIN_FACTS and subject.prompts is None):
        return None
    return load_facts(None if facts == BUILTIN_FACTS else Path(facts))
