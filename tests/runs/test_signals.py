"""What asks to stop is noted, and heard where nothing is lost by it."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager

import pytest

from spdcli.runs.signals import StopSignals, stop_signals

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@contextmanager
def answer(number, handler):
    """Within it, `handler` is the process's answer to a signal."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("numbers", [[INT], [TERM, TERM, TERM], [HUP, TERM, HUP], [TERM, INT], [INT, TERM]])
def test_what_comes_is_noted(numbers):
    with stop_signals() as signals:
        for number in numbers:
            os.kill(os.getpid(), number)
    assert signals == numbers


def test_a_second_ctrl_c_interrupts_a_step_and_no_save():
    signals = StopSignals()
    with signals.held():
        for _ in range(3):
            signals.note(INT)
    with pytest.raises(KeyboardInterrupt):
        signals.note(INT)


def test_a_terminal_that_goes_is_nothing_to_nohup():
    with answer(HUP, signal.SIG_IGN), stop_signals() as signals:
        os.kill(os.getpid(), HUP)
        assert signals == []
        assert signal.getsignal(HUP) == signal.SIG_IGN
