"""The only printer of spd: results on stdout, everything else on stderr.

| mode | stdout | stderr |
|---|---|---|
| human | tables, then the result's line | notes, warnings, errors; a live view, off a terminal a line now and then |
| `--json` | one JSON object | the same |
| `-q` | the result's line alone | warnings and errors |
"""

from __future__ import annotations

import json as jsonlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any, cast

from spdcli.errors import SpdError
from spdcli.progress import Progress as WorkProgress
from spdcli.progress import Report
from spdcli.records import plain

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import ConsoleOptions, RenderableType
    from rich.segment import Segment

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
PIPE_WIDTH = 120  # columns of a table that is written to a file or a pipe


class Console:
    """Prints for one command, in the mode that its options ask for.

    `json` prints one object and nothing else on stdout; `quiet` drops all but the result's line and
    what went wrong; `verbose` adds `debug` lines.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self._shown = False

    def show(self, data: Mapping[str, Any], *renderables: RenderableType) -> None:
        """The answer of a command, once: `data` for programs, `renderables` (text or rich tables) for people.

        In `data`, numbers that are not finite become null; arrays and tensors become lists. Text is
        printed as it is, in the cells of a table too: rich markup such as `[bold]` has no meaning, and
        control characters are escaped.
        """
        if self.json:
            assert not self._shown, "a command shows one JSON object"
            self._shown = True
            self._line(jsonlib.dumps(plain(data), allow_nan=False))
        elif not self.quiet:
            for renderable in renderables:
                with _delivered():
                    if isinstance(renderable, str):
                        self._out.print(self._fitted(escaped(renderable)), soft_wrap=True)
                    else:
                        self._out.print(_Escaped(renderable), crop=False)

    def result(self, text: object) -> None:
        """The one line that a script wants, last on stdout: the path of a run, as a rule. Not in JSON mode.

        A program gets it exactly, a terminal without control characters.
        """
        if not self.json:
            self._line(escaped(str(text)) if sys.stdout is not None and sys.stdout.isatty() else str(text))

    def note(self, text: str) -> None:
        """What is going on, for people."""
        if not self.quiet:
            self._say(text)

    def debug(self, text: str) -> None:
        """Detail that only `-v` shows."""
        if self.verbose:
            self._say(text, style="dim")

    def warn(self, text: str) -> None:
        """Something that the user should know although the command goes on; also with `-q`."""
        self._say(text, label="warning", style="bold yellow")

    def error(self, error: SpdError) -> None:
        """An expected failure: one line for each mistake, then the hint."""
        for line in error.message.split("\n"):
            self._say(line, label=error.label, style="bold red")
        if error.hint:
            self._say(error.hint, label="hint", style="bold cyan")

    @contextmanager
    def progress(self, text: str = "working") -> Iterator[Report]:
        """What work that takes a `Report` is given: steps move a view that goes away at the end, notes and warnings
        stay.

        The view begins at once, with `text`. Off a terminal a plain line takes its place, before half a minute has
        passed without one. With `-q` there is neither.
        """
        from spdcli.console.live import Standing, heartbeat, view

        standing = Standing(escaped(text))

        def report(progress: WorkProgress) -> None:
            if progress.total:
                standing.update(replace(progress, text=escaped(progress.text)))
            elif progress.warning:
                self.warn(progress.text)
            else:
                self.note(progress.text)

        report.hears_steps = True  # type: ignore[attr-defined]
        if self.quiet:
            yield report
            return
        moving = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        with view(standing, self._err) if moving else heartbeat(standing, self._say):
            yield report

    @cached_property
    def _out(self) -> RichConsole:
        from rich.console import Console as RichConsole

        width = None if self._has_width else PIPE_WIDTH
        return RichConsole(width=width, markup=False, emoji=False, highlight=False)

    @property
    def _has_width(self) -> bool:
        """Whether somebody looks at standard output in a width of their own: a terminal's, or that of COLUMNS."""
        return sys.stdout.isatty() or "COLUMNS" in os.environ

    def _fitted(self, text: str) -> str:
        """Lines for who looks at them, broken between words; a file or a pipe gets them whole."""
        from spdcli.console.fitting import folded

        return "\n".join(folded(text, self._out.width)) if self._has_width else text

    @cached_property
    def _err(self) -> RichConsole:
        from rich.console import Console as RichConsole

        return RichConsole(file=cast(IO[str], Unheard(sys.stderr)), markup=False, emoji=False, highlight=False)

    def _line(self, text: str) -> None:
        with _delivered():
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    def _say(self, text: str, label: str | None = None, style: str = "") -> None:
        from rich.text import Text

        text = escaped(text)
        parts = [(f"{label}: ", style), text] if label else [(text, style)]
        self._err.print(Text.assemble(*parts), soft_wrap=True)


def escaped(text: str) -> str:
    """`text` with what would steer a terminal, or turn the direction of writing, as `\\x1b` and the like.

    Names in files of others end up in what is printed; line ends and tabs stay.
    """
    return _STEERING.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


class _Escaped:
    """A rich renderable that fits, and whose text is escaped when it is laid out, in the cells of a table too."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.table import Table

        from spdcli.console.fitting import Fitted

        whole = Fitted(self._renderable) if isinstance(self._renderable, Table) else self._renderable
        for segment in console.render(whole, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))


@contextmanager
def _delivered() -> Iterator[None]:
    """Within it, a standard output that takes nothing is an SpdError; a reader that went away stays what it is."""
    if sys.stdout is None:
        raise SpdError("standard output is closed: the answer has nowhere to go")
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SpdError(f"standard output: cannot be written: {error.strerror}") from error


class Unheard:
    """A stream that loses what cannot be written: a note that nobody reads is no reason to stop work.

    A disk may be full, a terminal or the reader of a pipe may be gone.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
