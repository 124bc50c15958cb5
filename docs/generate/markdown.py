"""Markdown in small pieces: tables, code, and numbers as people read them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """A table whose first `words` columns are text; the others are numbers, and stand at the right."""
    cells = [[cell(value) for value in row] for row in rows]
    line = ["---"] * words + ["---:"] * (len(heads) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in [[cell(head) for head in heads], line, *cells])


def cell(value: object) -> str:
    """What a cell of a table says: one line, and no bar that would end it."""
    return " ".join(str(value).split()).replace("|", "&#124;")


def code(text: object) -> str:
    """Text as it is typed, also where it holds backticks, and bars that would end a cell."""
    content = " ".join(str(text).split("\n"))
    if "`" in content or "|" in content:
        return f"<code>{html.escape(content, quote=False).replace('|', '&#124;')}</code>"
    return f"`{content}`"


def fenced(language: str, text: str) -> str:
    """A block of code."""
    return f"```{language}\n{text.rstrip()}\n```"


def joined(parts: Iterable[str]) -> str:
    """Blocks with an empty line between them; an empty block leaves nothing."""
    return "\n\n".join(part.strip("\n") for part in parts if part.strip())


def number(value: float | None) -> str:
    """Three decimals, or an exponent where they would say nothing; a dash for what is no number."""
    if value is None:
        return "–"
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return f"{value:.1e}"


def percent(value: float | None, digits: int = 1) -> str:
    """A change with its sign, in percent."""
    return "–" if value is None else f"{value:+.{digits}%}"


def size(value: float | None, digits: int = 1) -> str:
    """The size of a change, or a share, in percent."""
    return "–" if value is None else f"{abs(value):.{digits}%}"


def duration(seconds: float) -> str:
    """A time as people say it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def memory(count: float) -> str:
    """Bytes as people say them."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
