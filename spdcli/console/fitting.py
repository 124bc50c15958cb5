"""Tables that fit: where a terminal is too narrow for one, its rows stand one below the other, headings by the values.

A number is never cut and never broken; text is wrapped down to LEAST columns, and what is cut with an ellipsis (lists
of tokens) down to LEAST_CUT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Column, Table

LEAST, LEAST_CUT = 12, 24  # columns of text that is wrapped, and of text that is cut
LONGEST_WORD = 30  # that is not broken
AROUND = 3  # columns of a cell's padding and border
INDENT = 2


class Fitted:
    """A table as it is where it fits, and else as records."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if fits(self._table, options.max_width):
            yield self._table
        else:
            yield from records(self._table, options.max_width)


def fits(table: Table, width: int) -> bool:
    """Whether a table is laid out in `width` columns and no number, word or list of tokens is cut too short.

    Rich shares what is left among the columns that have a ratio; where none has, it takes from the widest columns
    first, until they are all within one limit.
    """
    columns = table.columns
    room = width - 1 - AROUND * len(columns)
    natural, least = [widest(column) for column in columns], [_least(column) for column in columns]
    sharing = [table.expand and column.ratio is not None for column in columns]
    if any(sharing):
        each = (room - sum(n for n, shares in zip(natural, sharing, strict=True) if not shares)) // sum(sharing)
        return all(each >= low for low, shares in zip(least, sharing, strict=True) if shares)
    limit = max((n for n in range(room + 1) if sum(min(one, n) for one in natural) <= room), default=0)
    return all(n <= limit or low <= limit for n, low in zip(natural, least, strict=True))


def widest(column: Column) -> int:
    """The columns of the widest line in a table's column."""
    return max(map(_width, (column.header, *column.cells)))


def _width(cell: RenderableType) -> int:
    from rich.cells import cell_len

    return max(cell_len(line) for line in text_of(cell).splitlines() or [""])


def _least(column: Column) -> int:
    """How narrow a column may be: a heading is broken between words."""
    from rich.cells import cell_len

    words = text_of(column.header).split()
    cells = max(map(_width, column.cells), default=0)
    if column.justify == "right":
        return max([cells, *map(cell_len, words)])
    if column.no_wrap:
        return widest(column) if column.ratio is None else min(widest(column), max(column.min_width or 0, LEAST_CUT))
    words += [word for cell in column.cells for word in text_of(cell).split()]
    longest = max(map(cell_len, words), default=0)
    return min(widest(column), max(LEAST, min(longest, LONGEST_WORD)))


def text_of(cell: RenderableType) -> str:
    """What stands in a cell or heading."""
    return str(getattr(cell, "plain", cell))


def records(table: Table, width: int) -> Iterator[RenderableType]:
    """The rows of a table, each the first cell and then `heading value` for every other that is not empty."""
    from rich.padding import Padding
    from rich.text import Text

    if table.title:
        yield Text(text_of(table.title), style="italic")
    headings = [on_one_line(column.header) if table.show_header else "" for column in table.columns]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        head, *values = map(on_one_line, cells)
        parts = [named(heading, value) for heading, value in zip(headings[1:], values, strict=True) if value]
        first, *rest = packed([head, *parts], width)
        line = Text(first)
        line.stylize("bold", 0, len(head))
        yield line
        for part in rest:
            yield Padding(Text(part), (0, 0, 0, INDENT), expand=False)
    if table.caption:
        yield Text(text_of(table.caption), style="dim italic")


def on_one_line(cell: RenderableType) -> str:
    """A cell's text, its lines side by side."""
    return " ".join(text_of(cell).splitlines())


def named(heading: str, value: str) -> str:
    """A value with its heading; a mark that is called what it is stands alone."""
    return value if heading in ("", value) else f"{heading} {value}"


def packed(parts: Sequence[str], width: int) -> list[str]:
    """Parts side by side as far as they fit in lines, all but the first of which are indented."""
    from rich.cells import cell_len

    lines = [parts[0]]
    for part in parts[1:]:
        room = width - (INDENT if len(lines) > 1 else 0)
        if cell_len(lines[-1]) + 2 + cell_len(part) <= room:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines
