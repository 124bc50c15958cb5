"""Several processes started here, watched and ended together: what `--nproc` does.

Each is told what to do by a request on its standard input, and tells how it goes by lines of JSON on a pipe. Each has a
session of its own, so that what a terminal sends comes here, and is passed on; and each hears from its standard input
when this process is gone.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from io import FileIO
from pkgutil import resolve_name
from types import FrameType
from typing import Any, NoReturn

from spdcli.errors import Interrupted, LostProcess, SpdError, UsageError
from spdcli.progress import Progress, Report
from spdcli.runs.signals import stopping

TOLD_ON = "SPD_TOLD_ON"  # names the number of a process's pipe in its environment
PATIENCE = 20.0  # seconds that the others have to end by themselves, once one has failed
BREATH = 0.2  # seconds between two looks at the time
KINDS: dict[str, type[SpdError]] = {kind.__name__: kind for kind in (SpdError, UsageError, Interrupted, LostProcess)}
Work = Callable[[Mapping[str, Any], Report], None]


@dataclass(eq=False)
class Child:
    """One of the processes, the end of its pipe that is read here, and why it failed."""

    rank: int
    process: subprocess.Popen[bytes]
    told: FileIO
    error: SpdError | None = None

    def end(self, passed_on: Sequence[int]) -> None:
        """What is done when its pipe has ended: it has, or is about to. `passed_on` are signals that it was sent."""
        code = self.process.wait()
        if not code or self.error is not None:
            return
        if -code in passed_on:
            self.error = _expected(KeyboardInterrupt())
            return
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "memory may have run out; --resume goes on from what was saved last"
        self.error = SpdError(f"process {self.rank} of the run {how}", hint)

    def hear(self, line: bytes, report: Report) -> None:
        """Take in what it tells: how things stand, or why it fails."""
        told = json.loads(line)
        if "error" in told:
            error = told["error"]
            self.error = KINDS[error["kind"]](error["message"], error["hint"])
        else:
            report(Progress(**told["progress"]))


def launch(count: int, work: str, request: Mapping[str, Any], report: Report) -> None:
    """Call the function `work` (`module:name`, a `Work`) with the `request` in `count` processes of this machine, and
    wait until all have ended; `report` hears what they tell.

    Raises the reason of the first that failed, when all have ended: Interrupted where a signal stopped them.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its stubs

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))
    children: list[Child] = []
    passed_on: list[int] = []

    def pass_on(number: int, frame: FrameType | None = None) -> None:
        passed_on.append(number)
        for child in children:
            child.process.send_signal(number)

    listens = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, pass_on) for number in stopping()} if listens else {}
    try:
        for rank in range(count):
            children.append(_started(rank, count, work, request, store.port))
        _watch(children, passed_on, pass_on, report)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
            child.told.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if errors := [child.error for child in children if child.error is not None]:
        raise min(errors, key=_consequence)


def _consequence(error: SpdError) -> int:
    """How far an error may come of another one: a process that is told to stop, or hears no more of the others."""
    return 2 if isinstance(error, LostProcess) else int(isinstance(error, Interrupted))


def _started(rank: int, count: int, work: str, request: Mapping[str, Any], port: int) -> Child:
    reading, writing = os.pipe()
    own = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # they meet in this process, as those of torchrun meet in its agent
        TOLD_ON: writing,
    }
    threads = {"OMP_NUM_THREADS": str(max(1, _cores() // count))}
    process = subprocess.Popen(
        [sys.executable, "-c", f"from spdcli.runs.launching import serve; serve({work!r})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=threads | os.environ | {name: str(value) for name, value in own.items()},
        pass_fds=[writing],
        start_new_session=True,
    )
    os.close(writing)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has failed already
        process.stdin.write(f"{json.dumps(request)}\n".encode())
        process.stdin.flush()
    return Child(rank, process, FileIO(reading))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _watch(children: list[Child], passed_on: list[int], pass_on: Callable[[int], None], report: Report) -> None:
    """Hear what `children` tell until all have ended; once one has failed the others are asked to end, and PATIENCE
    later no longer waited for."""
    deadline = math.inf
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.told, selectors.EVENT_READ, child)
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(BREATH):
                child = key.data
                if line := child.told.readline():
                    child.hear(line, report)
                    continue
                selector.unregister(child.told)
                child.end(passed_on)
                if child.error is not None and deadline == math.inf:
                    deadline = time.monotonic() + PATIENCE
                    pass_on(signal.SIGTERM)


def serve(work: str) -> NoReturn:
    """The life of a process that `launch` started."""
    told = os.fdopen(int(os.environ.pop(TOLD_ON)), "w", encoding="utf-8")

    def tell(what: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # who started this process is gone, and it is about to hear so
            told.write(f"{json.dumps(what)}\n")
            told.flush()

    def report(progress: Progress) -> None:
        tell({"progress": asdict(progress)})

    try:
        for number in stopping():
            signal.signal(number, _interrupt)
        request = json.loads(sys.stdin.readline())
        threading.Thread(target=_end_with_the_other, daemon=True).start()
        resolve_name(work)(request, report)
        code = 0
    except BaseException as error:
        if os.environ.get("SPD_DEBUG") == "1":
            import traceback

            traceback.print_exception(error)
        expected = _expected(error)
        kind = next(kind.__name__ for kind in type(expected).__mro__ if kind.__name__ in KINDS)
        tell({"error": {"kind": kind, "message": expected.message, "hint": expected.hint}})
        code = expected.exit_code
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _end_with_the_other() -> None:
    """Ends this process as a shutdown would, once the one that started it is gone."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _expected(error: BaseException) -> SpdError:
    if isinstance(error, SpdError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("stopped; nothing was kept", "the same command begins anew")
    detail = " ".join(f"{type(error).__name__}: {error}".split())
    return SpdError(f"process {os.environ['RANK']} of the run: {detail}", "SPD_DEBUG=1 shows where")
