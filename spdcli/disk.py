"""Files and directories that appear whole or not at all, and are still there after the power went.

What is written grows in a folder of its own beside its place, is flushed to the disk, and is renamed into place. A
writer that is killed leaves that folder; the next one in the same place removes it. Text is UTF-8 in every locale.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from spdcli.errors import Missing, SpdError
from spdcli.records import plain

UNFINISHED = ".part"  # ends the name of a folder whose content is not whole yet
FORGOTTEN = 24 * 3600  # seconds after which such a folder is removed, whoever made it
APPENDING = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # neither through a link nor a pipe
NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}  # of disks that cannot flush a directory
MORE_SPACE = "free some space, or use --out"
LARGEST = 64 * 2**20  # bytes of a file that is read whole; recipes, reports and indexes are far smaller


def write_atomically(
    path: Path, write: Callable[[Path], object], hint: str = MORE_SPACE, before: Path | None = None
) -> None:
    """Let `write` fill a file of the name it is given, then rename that to `path`, and what was there to `before`.

    A failure leaves `path` as it was; SpdError with `hint` where the disk is the reason. A process that is killed
    between the two renames leaves `before` alone.
    """
    with written(path, hint), beside(path) as new:
        write(new)
        settle(new)
        if before is not None and path.exists():
            path.replace(before)
        new.replace(path)
        sync(path.parent)


def write_directory(path: Path, write: Callable[[Path], object], hint: str = MORE_SPACE) -> None:
    """As `write_atomically` with a directory, which takes the place of the one that is there."""
    path = path.absolute()
    with written(path, hint), beside(path) as new:
        new.mkdir()
        write(new)
        settle(new)
        before = new.with_name("before")
        if path.exists():
            path.rename(before)
        try:
            new.rename(path)
        except OSError:
            if before.exists():
                before.rename(path)
            raise
        sync(path.parent)


def write_text(path: Path, text: str, hint: str = MORE_SPACE) -> None:
    write_atomically(path, lambda new: new.write_text(text, encoding="utf-8", newline="\n"), hint)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file; SpdError where it cannot be, or leads elsewhere by a link."""
    with written(path), os.fdopen(os.open(path, APPENDING, 0o666), "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(plain(data), indent=1, allow_nan=False) + "\n")


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """The content of a file that anybody may have put there; SpdError unless it is a regular one of at most `most`
    bytes. A pipe would be waited for, and a device never ends."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            _require_regular(path, os.fstat(handle))
            content = file.read(most + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(content) > most:
        raise SpdError(f"{path}: larger than the {most / 2**20:g} MiB that are read of such a file")
    return content


def require_regular(path: Path) -> None:
    """SpdError unless `path`, or what it links to, is a regular file that can be looked at."""
    try:
        _require_regular(path, path.stat())
    except OSError as error:
        raise _unreadable(path, error) from error


def _require_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise SpdError(f"{path}: {what}, not a file")


def _unreadable(path: Path, error: OSError) -> SpdError:
    if isinstance(error, FileNotFoundError):
        return Missing(f"{path}: no such file")
    return SpdError(f"{path}: cannot be read: {error.strerror or error}", "ask its owner")


def read_object(path: Path, most: int = LARGEST) -> dict[str, Any]:
    """The object in a JSON file that anybody may have put there; SpdError where there is none."""
    try:
        content = json.loads(read_bytes(path, most).decode(), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise SpdError(f"{path}: not text in UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise SpdError(f"{path}: not a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise SpdError(f"{path}: not a JSON object, but a {type(content).__name__}")
    return content


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def written(path: Path, hint: str = MORE_SPACE) -> Iterator[None]:
    """Within it, a disk that refuses (full, read-only, gone) is an SpdError about `path`."""
    try:
        yield
    except OSError as error:
        raise SpdError(f"{path}: cannot be written: {error.strerror or error}", hint) from error
    except Exception as error:
        if "(os error " not in str(error):  # what libraries written in Rust raise says so in words alone
            raise
        raise SpdError(f"{path}: cannot be written: {' '.join(str(error).split())}", hint) from error


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path on the same disk as `path`, whose parents are made, to write at and to rename; removed afterwards.

    It has the name of `path`, in a folder that says which process made it. Such folders of dead processes go.
    """
    make_folder(path.parent)
    sweep(path.parent)
    folder = Path(tempfile.mkdtemp(UNFINISHED, f".spd-{os.getpid()}-{socket.gethostname()}-", path.parent))
    try:
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a directory with its parents, unless it is there, so that it survives the power's going."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def unfinished(folder: Path) -> list[Path]:
    """What writers into `folder`, at work or killed, have not finished."""
    return sorted(folder.glob(f".spd-*-*{UNFINISHED}"))


def sweep(folder: Path) -> None:
    """Remove what killed writers left in `folder`: of dead processes of this machine, and what is older than a day."""
    for left in unfinished(folder):
        pid, _, rest = left.name.removeprefix(".spd-").partition("-")
        ours = rest.startswith(f"{socket.gethostname()}-") and pid.isdigit()
        with suppress(OSError):  # its writer may remove it at the same time
            if (ours and not alive(int(pid))) or time.time() - left.stat().st_mtime > FORGOTTEN:
                remove(left)


def alive(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is somebody else's
        pass
    return True


def settle(path: Path) -> None:
    """Flush a new file, or a directory with all that is in it, to the disk; its files get the mode of the umask.

    Libraries write files that nobody else may read, by way of a temporary file of their own.
    """
    mode = _mode_of_a_new_file(path.parent)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        with suppress(PermissionError):  # of disks without modes
            file.chmod(mode)
        sync(file)
    for folder in {file.parent for file in files} | {path.parent}:
        sync(folder)


def _mode_of_a_new_file(folder: Path) -> int:
    """The mode that the umask, or the folder's own rules, give a file; nothing else tells without changing it."""
    probe = folder / "mode"
    os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666))
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_SYNC):
            raise
