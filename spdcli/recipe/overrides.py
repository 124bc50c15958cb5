"""Single settings from the command line, as `--set losses.minimality=0.1`, on top of a recipe's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tomli

from spdcli.errors import RecipeProblem, UsageError
from spdcli.recipe.contradiction import shortened, shown
from spdcli.recipe.toml_lines import BeyondBounds, KeyPath, read_tables, split_key


class Override(NamedTuple):
    """One setting from the command line: `option` is how the user wrote it."""

    option: str
    path: KeyPath
    value: Any


def text_in_place_of_prompts(source: str | Path) -> list[Override]:
    """The settings of `--data`: a corpus (`data.stream`) is decomposed on, by gates that hold on text they never saw,
    and the recipe's own prompts are left out."""
    option = f"--data {source}"
    settings = {("data", "stream"): str(source), ("data", "prompts"): None, ("importance", "basis"): "full"}
    return [Override(option, path, value) for path, value in settings.items()]


def parse_override(text: str, flag: str = "--set") -> Override:
    """`a.b=value`, as `flag` was given it; raises UsageError when there is no key or no `=`."""
    option = f"{flag} {shortened(' '.join(text.splitlines()))}"  # a message is one line
    dotted, equals, literal = text.partition("=")
    path = split_key(dotted.strip())
    try:
        text.encode()
    except UnicodeEncodeError:  # an argument whose bytes are not UTF-8
        raise UsageError(f"{flag} {shortened(text)!r}: not text in UTF-8") from None
    if not equals or path is None:
        raise UsageError(f"{option}: expected a key, = and a value", f"for example {flag} losses.minimality=0.1")
    try:
        return Override(option, path, _literal(literal.strip()))
    except BeyondBounds as error:
        raise UsageError(f"{option}: {lowered(error.msg)}") from None


def _literal(text: str) -> Any:
    """The TOML value that `text` writes, or `text` itself: `--set target.model=/some/dir` needs no quotes.

    BeyondBounds for a value that nobody means.
    """
    try:
        table = read_tables(f"value = {text}")
    except tomli.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text


def put(override: Override, raw: dict[str, Any]) -> RecipeProblem | None:
    """Writes an override into `raw`, making the sections that it needs; tells what stands in its way."""
    table = raw
    for depth, part in enumerate(override.path[:-1], start=1):
        inner = table.setdefault(str(part), {})
        if not isinstance(inner, dict):
            name = ".".join(str(part) for part in override.path[:depth])
            return RecipeProblem(override.option, None, name, f"{name} is {shown(inner)}, not a section")
        table = inner
    table[str(override.path[-1])] = override.value
    return None


def lowered(sentence: str) -> str:
    """The sentence with a small first letter."""
    return sentence[:1].lower() + sentence[1:]
