"""A run has one writer at a time, and a dead one does not count."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import pytest
from small_runs import ROOT

from spdcli.errors import SpdError
from spdcli.runs.lock import LOCK, Owner, locked, this_process

NOBODY = 2**22 + 1  # above the largest number that Linux gives a process
HOLD = """
import sys, pathlib
from spdcli.runs.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has locked `tmp_path`/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def leave(directory, **changes) -> Owner:
    """A lock file whose owner does not hold it."""
    owner = replace(this_process(), **changes)
    directory.mkdir(exist_ok=True)
    (directory / LOCK).write_text(json.dumps(asdict(owner)))
    return owner


def test_another_process_is_named_until_it_ends(tmp_path, holder):
    run = tmp_path / "run"
    with pytest.raises(SpdError) as info, locked(run):
        pass
    assert info.value.message.startswith(f"{run} is being written by process {holder.pid} of ")
    assert f" on {socket.gethostname()}, since 20" in info.value.message
    assert info.value.exit_code == 1
    holder.communicate()
    with locked(run) as left:
        assert left is None
    assert list(run.iterdir()) == []


def test_a_killed_process_leaves_a_lock_that_is_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    with locked(tmp_path / "run") as left:
        assert left.pid == holder.pid
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


def test_a_thread_may_lock_again_what_it_has_and_no_other_may(tmp_path):
    refused = []

    def other():
        try:
            with locked(tmp_path):
                pass
        except SpdError as error:
            refused.append(str(error))

    with locked(tmp_path):
        with locked(tmp_path / "." / "."):
            pass
        assert (tmp_path / LOCK).exists()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"process {os.getpid()} " in refused[0]
    with locked(tmp_path) as left:
        assert left is None


def test_a_lock_that_its_owner_removed_in_between_is_made_anew(tmp_path, monkeypatch):
    """Else two would have locked files of the same name, one of them gone."""
    flock, times = fcntl.flock, []

    def late(file, how):
        if not times:
            (tmp_path / LOCK).unlink()
        times.append(how)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert len(times) == 2


@pytest.mark.parametrize("content", ["", "{}", '{"user": "me"}', "[1]", "\x00"])
def test_what_stands_in_the_file_does_not_have_to_be_understood(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with locked(tmp_path) as left:
        assert left is None


def test_a_directory_that_is_removed_takes_its_lock_along(tmp_path):
    run = tmp_path / "run"
    with locked(run):
        shutil.rmtree(run)
        leave(run)  # of whoever made the directory anew
    assert (run / LOCK).exists()


@pytest.mark.parametrize(
    ("changes", "refused"),
    [({}, True), ({"pid": NOBODY}, False), ({"pid": NOBODY, "host": "elsewhere"}, True), (None, False)],
    ids=["alive", "dead", "elsewhere", "nobody"],
)
def test_on_a_disk_without_locks_the_file_is_believed(tmp_path, monkeypatch, changes, refused):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    owner = None if changes is None else leave(tmp_path, **changes)
    if refused:
        with pytest.raises(SpdError, match=f"process {owner.pid} of .* on {owner.host}") as info, locked(tmp_path):
            pass
        assert info.value.hint == f"if that process is no more, remove {tmp_path / LOCK}"
    else:
        with locked(tmp_path) as left:
            assert left == owner
    assert (tmp_path / LOCK).exists() == refused


def test_a_user_without_a_name_has_a_number(monkeypatch):
    def nameless():
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert this_process().user == str(os.getuid())
