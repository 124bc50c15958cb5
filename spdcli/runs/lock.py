"""One writer a run: a lock in its directory that says whose it is.

The system's own lock on the file (flock) holds, so that a process that dies, however it dies, leaves it open; what
stands in the file is for people. Where the disk knows no such locks, what stands in the file is believed.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import TextIOWrapper
from pathlib import Path

from spdcli.disk import alive, make_folder, written
from spdcli.errors import SpdError

LOCK = ".lock"
_held: set[tuple[Path, int]] = set()  # directories, each with the thread of this process that has locked it


@dataclass(frozen=True)
class Owner:
    """Who writes a run: user, machine, process, and the local time at which it began."""

    user: str
    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, since {self.since}"

    @property
    def may_be_alive(self) -> bool:
        """False only where this machine can tell that it is not."""
        return self.host != socket.gethostname() or alive(self.pid)


def this_process() -> Owner:
    """The owner that this process is."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in a container
        user = str(os.getuid())
    return Owner(user, socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))


@contextmanager
def locked(directory: Path) -> Iterator[Owner | None]:
    """While open, nobody else writes the run in `directory`, which is made. Gives whose lock was left there, if any.

    SpdError, naming the owner, where another process or thread has it. The same thread may open it again within.
    """
    key = (directory.resolve(), threading.get_ident())
    if key in _held:
        yield None
        return
    path = directory / LOCK
    with written(directory):
        make_folder(directory)
        file, left = _locked_file(path)
    _held.add(key)
    try:
        yield left
    finally:
        _held.discard(key)
        with suppress(OSError):  # the directory may be gone
            if _is_at(file, path):
                path.unlink()
        file.close()


def _locked_file(path: Path) -> tuple[TextIOWrapper, Owner | None]:
    """The lock's file, open and this process's own, and its owner before."""
    while True:
        # Neither through a link nor waiting for a pipe: whoever made the directory may have put one there.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise SpdError(f"{path}: not a file of spd's", "remove it")
        file = os.fdopen(handle, "r+", encoding="utf-8")
        left = _owner_in(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise _in_use(path, left, "wait for it or stop it, or name another directory with --out") from None
        except OSError:  # no locks on this disk
            if left and left.may_be_alive:
                file.close()
                raise _in_use(path, left, f"if that process is no more, remove {path}") from None
        if _is_at(file, path):
            break
        file.close()  # whoever had it removed it in between
    file.seek(0)
    file.truncate()
    json.dump(asdict(this_process()), file)
    file.flush()
    return file, left


def _owner_in(file: TextIOWrapper) -> Owner | None:
    try:
        return Owner(**json.load(file))
    except (ValueError, TypeError):  # it is being written, or not one of ours
        return None


def _is_at(file: TextIOWrapper, path: Path) -> bool:
    """Whether the open file is still the one that has the name `path`."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _in_use(path: Path, owner: Owner | None, hint: str) -> SpdError:
    return SpdError(f"{path.parent} is being written by {owner or 'another process'}", hint)
