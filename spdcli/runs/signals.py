"""Signals that ask to stop: noted while training goes on, and heard between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignals(list[int]):
    """The signals that came, in their order; training goes on while there are none."""

    _saving = False

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """The handler. A second Ctrl-C does not wait for the step's end; what stops a machine or a terminal does."""
        impatient = number == signal.SIGINT and number in self
        self.append(number)
        if impatient and not self._saving:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """While open, nothing interrupts: what is saved is saved to its end."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False


def stopping() -> list[signal.Signals]:
    """The signals that ask to stop: Ctrl-C, what ends a queue's job, and a terminal that goes, unless under `nohup`."""
    listened = [signal.SIGINT, signal.SIGTERM]
    return listened if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*listened, signal.SIGHUP]


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """While open, such a signal goes into what this gives instead of interrupting a step.

    Only the main thread of a program can listen: elsewhere it stays empty.
    """
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.note) for number in stopping()}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
