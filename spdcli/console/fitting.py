"""Tables that fit: where a terminal is too narrow for one, its rows stand one below the other, headings by the values.

A number is never cut and no word is broken; text is wrapped into about LINES lines, and what is cut with an ellipsis
(lists of tokens, by `Cut`) down to LEAST_CUT columns.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.measure import Measurement
    from rich.table import Column, Table
    from rich.text import Text, TextType

LEAST, ENOUGH, LEAST_CUT = 12, 40, 24  # columns of short and of any text that is wrapped, and of text that is cut
LINES = 3
AROUND = 3  # columns of a cell's padding and border
INDENT = 2
HARD = "\xa0"  # a blank that no line is broken at
LINE = "─" * 12  # between the records of two sections


class Fitted:
    """A table as it is where it fits, and else as records. Title and caption that are wider than it stand alone."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table, width = copy.copy(self._table), options.max_width
        if not fits(table, width):
            yield from records(table, width)
            return
        own = width if table.expand else min(width, console.measure(table, options=options).maximum)
        above, below = (text if text and _width(text) > own else None for text in (table.title, table.caption))
        if above:
            table.title = None
            yield line_of(above, width, "italic")
        if below:
            table.caption = None
        yield table
        if below:
            yield line_of(below, width, "dim italic")


class Cut:
    """A cell of words (of which none is broken): as many as one line holds, and an ellipsis for the others."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words

    @property
    def plain(self) -> str:
        """All of them."""
        return " ".join(word.replace(" ", HARD) for word in self._words)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(min(LEAST_CUT, _width(self)), _width(self))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.cells import cell_len
        from rich.text import Text

        shown = self.plain
        for count in reversed(range(len(self._words))):
            if cell_len(shown) <= options.max_width:
                break
            shown = " ".join([*self._words[:count], "…"])
        yield Text(shown.replace(HARD, " "), no_wrap=True, overflow="ellipsis")


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
    """The columns of the widest line in a table's column, or those that it always has."""
    return column.width or max(map(_width, (column.header, *column.cells)))


def _width(cell: RenderableType) -> int:
    from rich.cells import cell_len

    return max(cell_len(line) for line in text_of(cell).splitlines() or [""])


def _least(column: Column) -> int:
    """How narrow a column may be: a heading is broken between words."""
    from rich.cells import cell_len

    if column.width:
        return column.width
    words = text_of(column.header).split()
    cells = max(map(_width, column.cells), default=0)
    if column.justify == "right" and not column.no_wrap:
        return max([cells, *map(cell_len, words)])
    if column.no_wrap:
        return widest(column) if column.ratio is None else min(widest(column), max(column.min_width or 0, LEAST_CUT))
    words += [word for cell in column.cells for word in text_of(cell).split()]
    few_lines = min(ENOUGH, max(LEAST, cells // LINES))
    return min(widest(column), max([few_lines, *map(cell_len, words)]))


def text_of(cell: RenderableType) -> str:
    """What stands in a cell or heading."""
    return str(getattr(cell, "plain", cell))


def records(table: Table, width: int) -> Iterator[RenderableType]:
    """The rows of a table, each the first cell and then `heading value` for every other that is not empty."""
    if table.title:
        yield line_of(table.title, width, "italic")
    headings = [on_one_line(column.header) if table.show_header else "" for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    for nth, (row, cells) in enumerate(zip(table.rows, rows, strict=True), start=1):
        head, *values = map(on_one_line, cells)
        parts = [named(heading, value) for heading, value in zip(headings[1:], values, strict=True) if value]
        first, *rest = packed([head, *parts], width)
        line = line_of(first, width)
        line.stylize("bold", 0, len(line) if first == head else len(head))
        yield line
        for part in rest:
            yield line_of(" " * INDENT + part, width)
        if row.end_section and nth < len(table.rows):
            yield line_of(LINE, width)
    if table.caption:
        yield line_of(table.caption, width, "dim italic")


def line_of(text: TextType, width: int, style: str = "") -> Text:
    """Text that is broken between words, and that rich leaves as it is."""
    from rich.text import Text

    lines = "\n".join(folded(text_of(text), width)).replace(HARD, " ")
    return Text(lines, style=style, no_wrap=True, overflow="ignore")


def folded(text: str, width: int) -> list[str]:
    """The lines of a text, broken between words where they are wider than so many columns; what follows is indented.

    Behind `name  text` it stands below the text, where that leaves it half of the width. A number stays with its words,
    between commas or semicolons, where the line is half full by then. A longer word, such as a path, is not broken.
    """
    from rich.cells import cell_len

    lines = []
    for line in text.splitlines() or [""]:
        name = re.match(r" *[^ ]+ {2,}(?=[^ ])", line)
        blanks = len(line) - len(line.lstrip(" "))
        indent = " " * (len(name[0]) if name and len(name[0]) <= width // 2 else blanks + INDENT)
        current = ""
        for phrase in re.split("(?<=[,;])(?= )", line):
            whole, half_full = indent + phrase.lstrip(" "), cell_len(current) > width // 2
            fits_below = cell_len(current + phrase) > width >= cell_len(whole)
            if half_full and fits_below and any(map(str.isdigit, phrase)):
                lines.append(current)
                current = whole
                continue
            for word in re.findall(" *[^ ]+", phrase):
                if current and cell_len(current + word) > width:
                    lines.append(current)
                    current = indent + word.lstrip(" ")
                else:
                    current += word
        lines.append(current)
    return lines


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
