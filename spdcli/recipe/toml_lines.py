"""Where every key of a TOML document stands: what `tomli` reads but does not tell.

Works on text that `tomli` has accepted, so it only has to find its way, never to judge.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import lru_cache
from typing import Any

import tomli

KeyPath = tuple[str | int, ...]

DEEPEST = 50  # arrays, tables and parts of a key in each other
LARGEST = 2**63  # whole numbers are of 64 bits in TOML

_BLANK = re.compile(r"(?:\s|#[^\n]*)*")
_KEY_PART = r"""(?:[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*')"""
_KEY = re.compile(rf"{_KEY_PART}(?:[ \t]*\.[ \t]*{_KEY_PART})*")
_STRING = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*\'''',
    re.DOTALL,
)
_LONG_NUMBER = re.compile(r"[0-9][0-9_xobA-Fa-f]{15,}")
_SCALAR = re.compile(r"[^,\]}\n#]+")


class BeyondBounds(ValueError):
    """TOML that is nested, or has numbers, as nobody writes it: `msg`, line and column as of a TOMLDecodeError."""

    def __init__(self, msg: str, text: str, position: int) -> None:
        super().__init__(msg)
        self.msg = msg
        self.lineno = text.count("\n", 0, position) + 1
        self.colno = position - text.rfind("\n", 0, position)


def read_tables(text: str) -> dict[str, Any]:
    """The tables of a TOML document; TOMLDecodeError where it is none, BeyondBounds where it is too much of one."""
    try:
        tables = tomli.loads(text)
    except tomli.TOMLDecodeError:
        raise
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        raise _beyond(text) from None
    level: list[Any] = [tables]
    for _ in range(DEEPEST):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list) or (isinstance(inner, int) and abs(inner) >= LARGEST)
        ]
        if any(isinstance(value, int) for value in level):
            raise _beyond(text)
    if level:
        raise _beyond(text)
    return tables


def _beyond(text: str) -> BeyondBounds:
    """What is wrong with numbers that are too long, and with what is nested too deep, where it can be seen."""
    number = _LONG_NUMBER.search(text)
    if number:
        return BeyondBounds("A whole number is beyond 64 bits", text, number.start())
    return BeyondBounds(f"More than {DEEPEST} arrays, tables or parts of a key are in each other", text, 0)


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line (from 1) of every key, section header and array element of a valid TOML `text`.

    A path is a tuple of names and, inside arrays, indices: `("data", "prompts", 1)`.
    """
    return _Scanner(text).document()


@lru_cache(4096)
def split_key(dotted: str) -> KeyPath | None:
    """The parts of a TOML key such as `a."b.c".d`, or None when it is not one."""
    if not _KEY.fullmatch(dotted):
        return None
    parts: list[str | int] = []
    try:
        table = read_tables(f"{dotted} = 0")
    except (tomli.TOMLDecodeError, BeyondBounds):
        return None
    while isinstance(table, dict):
        ((name, table),) = table.items()
        parts.append(name)
    return tuple(parts)


class _Scanner:
    """Walks the document once, from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self.lines: dict[KeyPath, int] = {}
        self.last_element: dict[KeyPath, int] = {}  # of every array of tables so far

    def document(self) -> dict[KeyPath, int]:
        section: KeyPath = ()
        while self.peek():
            if self.peek() == "[":
                section = self.header()
            else:
                self.pair(section)
        return self.lines

    def header(self) -> KeyPath:
        """Reads `[a.b]` or `[[a.b]]`; a name that stands for an array of tables means its last element."""
        repeated = self.text.startswith("[[", self.position)
        self.position += 2 if repeated else 1
        parts = self.key_parts()
        path: KeyPath = ()
        for depth, part in enumerate(parts, start=1):
            path = (*path, part)
            self.lines.setdefault(path, self.line())
            if path in self.last_element and not (repeated and depth == len(parts)):
                path = (*path, self.last_element[path])
        if repeated:
            self.last_element[path] = self.last_element.get(path, -1) + 1
            path = (*path, self.last_element[path])
            self.lines[path] = self.line()
        self.skip("]]" if repeated else "]")
        return path

    def pair(self, prefix: KeyPath) -> None:
        """Reads `a.b = value`, and notes the line of each part of the key that is new."""
        parts = self.key_parts()
        for length in range(1, len(parts) + 1):
            self.lines.setdefault(prefix + parts[:length], self.line())
        self.skip("=")
        self.value(prefix + parts)

    def key_parts(self) -> KeyPath:
        self.peek()
        parts = split_key(self.take(_KEY))
        assert parts is not None
        return parts

    def value(self, path: KeyPath) -> None:
        opening = self.peek()
        if opening == "[":
            self.array(path)
        elif opening == "{":
            self.inline_table(path)
        else:
            self.take(_STRING if opening in "\"'" else _SCALAR)

    def array(self, path: KeyPath) -> None:
        self.skip("[")
        index = 0
        while self.peek() != "]":
            self.lines[(*path, index)] = self.line()
            self.value((*path, index))
            index += 1
            if self.peek() == ",":
                self.skip(",")
        self.skip("]")

    def inline_table(self, path: KeyPath) -> None:
        self.skip("{")
        while self.peek() != "}":
            self.pair(path)
            if self.peek() == ",":
                self.skip(",")
        self.skip("}")

    def line(self) -> int:
        return bisect_right(self.newlines, self.position - 1) + 1

    def peek(self) -> str:
        """The next character that is neither space nor comment; empty at the end."""
        blank = _BLANK.match(self.text, self.position)
        assert blank is not None
        self.position = blank.end()
        return self.text[self.position : self.position + 1]

    def take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.position)
        assert match is not None, f"not valid TOML at {self.position}"
        self.position = match.end()
        return match.group()

    def skip(self, expected: str) -> None:
        self.peek()
        assert self.text.startswith(expected, self.position), f"no {expected!r} at {self.position}"
        self.position += len(expected)
