"""Where every key of a TOML document stands: what `tomli` reads but does not tell.

Works on text that `tomli` has accepted, so it only has to find its way, never to judge.
"""

from __future__ import annotations

import re
from bisect import bisect_right

import tomli

KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"(?:\s|#[^\n]*)*")
_KEY_PART = r"""(?:[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*')"""
_KEY = re.compile(rf"{_KEY_PART}(?:[ \t]*\.[ \t]*{_KEY_PART})*")
_STRING = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*\'''',
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}\n#]+")


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line (from 1) of every key, section header and array element of a valid TOML `text`.

    A path is a tuple of names and, inside arrays, indices: `("data", "prompts", 1)`.
    """
    return _Scanner(text).document()


def split_key(dotted: str) -> KeyPath | None:
    """The parts of a TOML key such as `a."b.c".d`, or None when it is not one."""
    if not _KEY.fullmatch(dotted):
        return None
    parts: list[str | int] = []
    table = tomli.loads(f"{dotted} = 0")
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
