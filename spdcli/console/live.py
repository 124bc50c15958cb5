"""Long work while it goes on: a view that moves on a terminal, elsewhere a plain line every half a minute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any

from spdcli.progress import Progress as WorkProgress

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import Progress

SILENCE = 25.0  # seconds without a line after which one is written, off a terminal
BARS = "▁▂▃▄▅▆▇█"
SPARK = 24  # columns of a sparkline, at most
ORDERS = 10.0  # a curve whose largest value is so many times its smallest is drawn on a logarithmic scale


class Standing:
    """How work stands: what was told last, and the course of its terms."""

    def __init__(self, text: str) -> None:
        self.last = WorkProgress(text)
        self.curves: dict[str, list[float]] = {}
        self.begun = monotonic()
        self.phase = (self.begun, 0)  # when it began, and at which step

    def update(self, progress: WorkProgress) -> None:
        """Take in what is told; a `done` that falls, or another `total`, begins a new phase."""
        if progress.total != self.last.total or progress.done < self.last.done:
            self.phase = (monotonic(), progress.done)
            self.curves = {}
        if progress.step_only:
            last = self.last
            numbers, terms, groups = last.numbers, last.terms, last.groups
            progress = WorkProgress(last.text, progress.done, progress.total, False, numbers, terms, groups)
        else:
            for name, value in {**progress.numbers, **progress.terms}.items():
                self.curves.setdefault(name, []).append(value)
        self.last = progress

    @property
    def seconds_a_step(self) -> float | None:
        """The mean since the phase began; None before its first step is done."""
        begun, first = self.phase
        steps = self.last.done - first
        return (monotonic() - begun) / steps if steps > 0 else None

    @property
    def left(self) -> str:
        """The time left, as h:mm:ss; empty where it cannot be told."""
        each = self.seconds_a_step
        return "" if each is None else f"{clock(each * (self.last.total - self.last.done))} left"

    @property
    def rate(self) -> str:
        """Steps a second, or seconds a step when that is the larger number."""
        each = self.seconds_a_step
        if not each:
            return ""
        return f"{1 / each:.1f} steps/s" if each < 1 else f"{each:.1f} s/step"

    def line(self) -> str:
        """All in one line, the numbers that matter first."""
        last = self.last
        if not last.total:
            return f"{last.text}, {clock(monotonic() - self.begun)} so far"
        numbers = [f"{name} {short(value)}" for name, value in last.numbers.items()]
        parts = [f"{last.done}/{last.total}", *numbers, self.left, self.rate, "" if numbers else last.text]
        return "  ".join(part for part in parts if part)


def clock(seconds: float) -> str:
    """A span of time.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def short(value: float) -> str:
    """A number in few characters.

    >>> short(396.2), short(0.0714), short(3e-9)
    ('396', '0.0714', '3.00e-09')
    """
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def sparkline(values: Sequence[float], width: int = SPARK) -> str:
    """The course of a number, its smallest value low and its largest high; empty where one is not finite.

    >>> sparkline([1.0, 2.0, 3.0, 4.0]), sparkline([1.0, 1.0])
    ('▁▃▆█', '▁▁')
    """
    step = max(1.0, len(values) / width)
    shown = [values[min(int(n * step), len(values) - 1)] for n in range(min(width, len(values)))]
    shown[-1:] = values[-1:]
    if not all(map(math.isfinite, shown)):
        return ""
    lowest, highest = min(shown), max(shown)
    if lowest > 0 and highest > ORDERS * lowest:
        shown, lowest, highest = [math.log(value) for value in shown], math.log(lowest), math.log(highest)
    span = (highest - lowest) or math.inf
    return "".join(BARS[round((value - lowest) / span * (len(BARS) - 1))] for value in shown)


class View:
    """`Standing` as something that rich draws again and again: a bar, and below it what there is to see."""

    def __init__(self, standing: Standing, bar: Progress) -> None:
        self.standing = standing
        self.bar = bar
        self.task = bar.add_task(standing.last.text, total=None)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        last = self.standing.last
        text = "  ".join(f"{name} {short(value)}" for name, value in last.numbers.items()) or last.text
        elapsed = clock(monotonic() - self.standing.begun)
        times = "  ".join(part for part in (self.standing.left or elapsed, self.standing.rate) if part)
        self.bar.update(self.task, completed=last.done, total=last.total or None, description=text, times=times)
        counts = "  ".join(f"{name} {value:.2f}" for name, value in last.groups.items())
        groups = [Text(f"L0  {counts}", no_wrap=True, overflow="ellipsis")] if counts else []
        return Group(self.bar, *self.curves(last.terms), *groups)

    def curves(self, terms: Mapping[str, float]) -> list[Any]:
        """A line a term: its name, its value, its course."""
        from rich.text import Text

        wide = max((len(name) for name in terms), default=0)
        return [
            Text(f"{name:<{wide}}  {short(value):>9}  {sparkline(self.standing.curves[name])}", no_wrap=True)
            for name, value in terms.items()
        ]


@contextmanager
def view(standing: Standing, console: RichConsole) -> Iterator[None]:
    """While open, the view of `standing` is on the terminal, and then goes away."""
    from rich.live import Live

    with Live(View(standing, _bar()), console=console, transient=True, refresh_per_second=4):
        yield


@contextmanager
def heartbeat(standing: Standing, say: Callable[[str], None]) -> Iterator[None]:
    """While open, a line of `standing` every SILENCE seconds."""
    over = Event()

    def beat() -> None:
        while not over.wait(SILENCE):
            say(standing.line())

    thread = Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _bar() -> Progress:
    """Steps, a bar, text, time left and rate on one line: a text that is too long is cut, the rest never."""
    from rich.progress import Progress, ProgressColumn, SpinnerColumn
    from rich.table import Column
    from rich.text import Text

    class Description(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(task.description, no_wrap=True, overflow="ellipsis")

    class Times(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(task.fields.get("times", ""))

    class Steps(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.completed}/{task.total}" if task.total else "…")

    return Progress(
        SpinnerColumn(),
        Steps(table_column=Column(no_wrap=True)),
        Description(),
        Times(table_column=Column(no_wrap=True)),
    )
