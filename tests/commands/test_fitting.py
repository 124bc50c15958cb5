"""Tables on narrow terminals: as they are where they fit, else rows one below the other, and no number is lost."""

from __future__ import annotations

import io
import re
from collections import Counter

import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from spdcli.commands.inspect import occurrence_table
from spdcli.console.fitting import Cut, Fitted, fits, folded
from spdcli.measures.inspection import Occurrence, SliceActivity

LABELS = [f"' token-{number}'" for number in range(5)]
SLICES = [
    SliceActivity("layers.10.mlp.gate_proj:412", 0.928, True, -5.52, LABELS, LABELS[::-1]),
    SliceActivity("layers.0.mlp.up_proj:2", 0.104, False, 27.41, LABELS[:1], []),
]
PLACE = Occurrence(1, "Kobe Bryant", 2, " Bryant", 2, SLICES)


def printed(table: Table, width: int) -> list[str]:
    """The lines of a table on a terminal of so many columns."""
    screen = rich.console.Console(file=io.StringIO(), width=width)
    screen.print(Fitted(table))
    return [line.rstrip() for line in screen.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def small() -> Table:
    table = Table(title="Sizes", caption="in metres")
    table.add_column("what")
    table.add_column("*")
    table.add_column("how\nlong", justify="right")
    table.add_column("kind")
    table.add_row("a bridge", "*", "1234.5", "of stone and iron")
    table.add_row("a cart", "", "2.0", "")
    return table


def test_what_fits_by_hand() -> None:
    """A border, three columns of frame a cell, `a bridge`, `*`, `1234.5`; the text gets what is left, 12 at least."""
    frame = 1 + 4 * 3
    assert fits(small(), frame + 8 + 1 + 6 + 18)
    assert fits(small(), frame + 8 + 1 + 6 + 12)
    assert not fits(small(), frame + 8 + 1 + 6 + 11)


def test_a_heading_is_broken_before_a_number_is() -> None:
    table = Table()
    for heading in ("what", "mean squared change", "another output moves by"):
        table.add_column(heading, justify="right")
    table.add_row("a", "0.0001234", "0.5")
    assert fits(table, 1 + 3 * 3 + 4 + 9 + 9)
    assert not fits(table, 1 + 3 * 3 + 4 + 9 + 8)
    assert any("0.0001234" in line for line in printed(table, 32))
    assert printed(table, 31)[0] == "a"


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 14), st.booleans()), min_size=2, max_size=7),
    st.integers(30, 120),
)
def test_no_number_is_broken_at_any_width(columns: list[tuple[int, int, bool]], width: int) -> None:
    """Columns of headings of so many letters, in words of five, and of numbers of so many digits, or of such words."""
    table = Table(expand=True)
    numbers = []
    for heading, digits, is_number in columns:
        table.add_column(words_of(heading), justify="right" if is_number else "left")
        numbers.append("7" * digits if is_number else words_of(heading))
    table.add_row(*numbers)
    text = " ".join(printed(table, width))
    found = Counter(re.findall("7+", text))
    assert found == Counter(n for n in numbers if n.startswith("7"))


def words_of(letters: int) -> str:
    return " ".join("a" * min(5, letters - start) for start in range(0, letters, 5))


def test_records_by_hand() -> None:
    assert printed(small(), 40)[0].startswith(" "), "a table that fits, its title centred"
    assert printed(small(), 39) == [
        "Sizes",
        "a bridge  *  how long 1234.5",
        "  kind of stone and iron",
        "a cart  how long 2.0",
        "in metres",
    ]
    assert printed(small(), 20) == [
        "Sizes",
        "a bridge  *",
        "  how long 1234.5",
        "  kind of stone and",
        "    iron",
        "a cart  how long 2.0",
        "in metres",
    ]


def test_a_table_without_headings_has_none_in_its_records() -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_row("memory", "1.11 GiB")
    assert printed(table, 12) == ["memory", "  1.11 GiB"]


def test_sections_stay_apart_in_records() -> None:
    table = Table("what", "how long")
    for name in ("a bridge", "a cart"):
        table.add_row(name, "1", end_section=True)
    assert printed(table, 12) == ["a bridge", "  how long 1", "────────────", "a cart", "  how long 1"]


def test_a_title_that_is_wider_than_its_table_stands_alone() -> None:
    table = Table("m", title="lengths of 12 bridges", caption="and of 1234 carts")
    table.add_row("1.5")
    assert printed(table, 40)[0] == "lengths of 12 bridges"
    assert printed(table, 40)[-1] == "and of 1234 carts"
    assert printed(table, 16)[:2] == ["lengths of 12", "  bridges"]


def test_text_is_folded_by_hand() -> None:
    assert folded("one two three", 7) == ["one two", "  three"]
    assert folded("/a/path/that/is/long and 12", 9) == ["/a/path/that/is/long", "  and 12"]
    assert folded("name  one two three", 13) == ["name  one two", "      three"]
    assert folded("long-name  one two", 14) == ["long-name  one", "  two"]
    assert folded("sizes: K 0.94, V 0.12", 16) == ["sizes: K 0.94,", "  V 0.12"], "a number stays with its name"
    assert folded("two, three of them", 12) == ["two, three", "  of them"]
    assert folded("  a\n\nb", 9) == ["  a", "", "b"]


@pytest.mark.parametrize(("width", "shown"), [(11, "' 12' ' 34'"), (10, "' 12' …"), (7, "' 12' …"), (6, "…")])
def test_no_word_of_a_list_is_cut_in_two(width: int, shown: str) -> None:
    screen = rich.console.Console(file=io.StringIO(), width=width)
    screen.print(Cut(["' 12'", "' 34'"]))
    assert screen.file.getvalue() == f"{shown}\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_inspect_is_read_at_every_width(width: int) -> None:
    lines = printed(occurrence_table(PLACE), width)
    text = " ".join(" ".join(lines).split())
    assert all(len(line) <= width for line in lines)
    for number in ("0.928", "-5.52", "0.104", "27.41"):
        assert number in text
    assert all(one.slice in text for one in SLICES)
    shown = sum(f"token-{number}" in text for number in range(len(LABELS)))
    assert shown == len(LABELS) or (width == 120 and shown >= 2), "what is cut keeps a few tokens"
