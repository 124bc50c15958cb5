"""Whole files or none, flushed to the disk, readable by whom the umask says, in UTF-8, and nothing left lying."""

from __future__ import annotations

import os
import resource
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_runs import ROOT, TOY, one_line, spd_here

from spdcli import disk
from spdcli.disk import FORGOTTEN, beside, sweep, unfinished, write_directory, write_json, write_text
from spdcli.errors import SpdError
from spdcli.files import CHECKSUM, load_tensors, save_tensors


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Within it, this process can write no file larger than `size` bytes, by whatever library."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def two_files(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "a.txt").write_text("a")
    save_file({"a": torch.zeros(3)}, folder / "b.safetensors")


# --- flushed -----------------------------------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch):
    """What is flushed and renamed, in order: ("sync", name) and ("rename", name)."""
    seen: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def noted_sync(handle):
        seen.append(("sync", Path(f"/proc/self/fd/{handle}").readlink().name))
        fsync(handle)

    def noted(move):
        def moved(path, target):
            seen.append(("rename", Path(target).name))
            return move(path, target)

        return moved

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted(replace))
    monkeypatch.setattr(Path, "rename", noted(rename))
    return seen


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_all_goes_on(tmp_path, events):
    write_text(tmp_path / "new" / "a.txt", "a")
    first, file, rename = (
        events.index(one) for one in (("sync", tmp_path.name), ("sync", "a.txt"), ("rename", "a.txt"))
    )
    assert first < file < rename  # the new folder's own name first
    assert events[-1] == ("sync", "new")


def test_a_directory_is_on_the_disk_with_all_its_files_before_its_name(tmp_path, events):
    write_directory(tmp_path / "model", two_files)
    rename = events.index(("rename", "model"))
    synced = {name for kind, name in events[:rename] if kind == "sync"}
    assert {"a.txt", "b.safetensors", "inner", "model"} <= synced
    assert events[-1] == ("sync", tmp_path.name)


def test_a_disk_that_cannot_flush_directories_is_written_to(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(tmp_path / "a.txt", "a")
    assert (tmp_path / "a.txt").read_text() == "a"


def test_a_flush_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """That is how a network disk says that it is full."""
    write_text(tmp_path / "a.txt", "old")

    def refuse(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(SpdError, match=r"a\.txt: cannot be written: No space left on device"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_directory_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    write_directory(tmp_path / "model", two_files)
    rename = Path.rename

    def refuse(path, target):
        if path.name == "model" and Path(target) == tmp_path / "model":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(SpdError, match=r"model: cannot be written: No space left on device"):
        write_directory(tmp_path / "model", two_files)
    assert (tmp_path / "model" / "inner" / "a.txt").read_text() == "a"


# --- modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)])
def test_files_follow_the_umask(tmp_path, umask, mode, folder_mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "a")
        save_tensors(tmp_path / "b.safetensors", {"a": torch.zeros(3)})
        write_directory(tmp_path / "model", two_files)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 4
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}
    assert {stat.S_IMODE((tmp_path / "model" / inner).stat().st_mode) for inner in (".", "inner")} == {folder_mode}


# --- what killed writers leave ------------------------------------------------------------------------------


def killed_writer(path: Path) -> Path:
    """The folder that a process leaves which is killed while it writes `path`."""
    code = "import os, signal, sys, pathlib\nfrom spdcli.disk import write_atomically\n"
    code += "write_atomically(pathlib.Path(sys.argv[1]), lambda new: (new.write_text('half'), os.kill(os.getpid(), 9)))"
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False).returncode == -9
    (left,) = unfinished(path.parent)
    return left


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    left = killed_writer(tmp_path / "a.txt")
    assert (left / "a.txt").read_text() == "half"
    write_text(tmp_path / "other.txt", "b")
    assert [file.name for file in tmp_path.iterdir()] == ["other.txt"]


def test_what_others_are_writing_stays(tmp_path):
    """A process of this machine that lives, and for a day any of another machine."""
    elsewhere = tmp_path / ".spd-1-elsewhere-x.part"
    elsewhere.mkdir()
    with beside(tmp_path / "mine.txt") as mine:
        mine.write_text("half")
        sweep(tmp_path)
        assert mine.exists()
        assert elsewhere.exists()
        long_ago = time.time() - FORGOTTEN - 1
        os.utime(elsewhere, (long_ago, long_ago))
        sweep(tmp_path)
        assert mine.exists()
        assert not elsewhere.exists()
    assert unfinished(tmp_path) == []


def test_init_is_alive_and_no_process_is_not():
    assert disk.alive(1)
    assert disk.alive(os.getpid())
    assert not disk.alive(2**22 + 1)  # above the largest number that Linux gives
    assert not disk.alive(10**30)


def test_a_file_that_lies_there_under_such_a_name_goes_too(tmp_path):
    (tmp_path / f".spd-{2**22 + 1}-{socket.gethostname()}-x.part").write_text("a file")
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- full disks --------------------------------------------------------------------------------------------


@pytest.fixture
def spd(monkeypatch, capsys):
    return spd_here(monkeypatch, capsys)


def test_a_recipe_is_copied_whole_or_not_at_all(spd, tmp_path):
    mine = tmp_path / "mine.toml"
    with full_disk(100):
        code, printed, err = spd("recipe", "cp", "gpt2", mine)
    assert (code, printed) == (1, "")
    one_line(err, f"{mine}: cannot be written: File too large", "free some space")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [100, 1500, 3000])
def test_a_disk_that_fills_while_training_is_one_line(spd, tmp_path, size):
    """In the recipe, in the metrics or in a figure."""
    (tmp_path / "toy.toml").write_text(TOY)
    with full_disk(size):
        code, printed, err = spd("decompose", tmp_path / "toy.toml", "--out", tmp_path / "run", "-q")
    assert (code, printed) == (1, "")
    one_line(
        "".join(line for line in err.splitlines(True) if not line.startswith("warning: ")),
        "cannot be written: ",
        "File too large",
    )
    assert not [path for path in tmp_path.rglob("*") if path.suffix == disk.UNFINISHED]


@pytest.mark.parametrize("size", [10, 3000, 30_000])
def test_a_model_is_saved_whole_or_not_at_all(tmp_path, tiny_gpt2_dir, size):
    """In its configuration, its tokenizer or its weights; transformers and tokenizers raise errors of their own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(tiny_gpt2_dir) for kind in (AutoModelForCausalLM, AutoTokenizer))

    def write(folder):
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)

    with full_disk(size), pytest.raises(SpdError, match=r"edited: cannot be written: .*File too large") as info:
        write_directory(tmp_path / "edited", write)
    assert "\n" not in info.value.message
    assert list(tmp_path.iterdir()) == []


# --- text --------------------------------------------------------------------------------------------------


def test_text_is_utf_8_in_every_locale(tmp_path):
    code = "import pathlib, sys; from spdcli.disk import *\n"
    code += (
        "write_text(pathlib.Path('a.txt'), 'Gr\\xf6\\xdfe'); print(read_object(pathlib.Path('b.json'))['a'] == '\\xf6')"
    )
    (tmp_path / "b.json").write_bytes('{"a": "ö"}'.encode())
    plain = {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | plain, capture_output=True)
    assert (run.returncode, run.stdout) == (0, b"True\n"), run.stderr
    assert (tmp_path / "a.txt").read_bytes() == "Größe".encode()


# --- damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["a bit", "the tail"])
def test_damaged_numbers_are_noticed(tmp_path, damage):
    """A bit that flipped, and zeros where the disk never wrote: the file's form is whole in both."""
    path = tmp_path / "t.safetensors"
    tensors = {
        "a": torch.randn(100),
        "none": torch.zeros(0),
        "flag": torch.tensor(True),
        "b": torch.randn(3).bfloat16(),
    }
    save_tensors(path, tensors)
    assert torch.equal(load_tensors(path)[0]["a"], tensors["a"])
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[-7] ^= 4
    else:
        content[-50:] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(SpdError, match=r"t\.safetensors: damaged: it does not hold what was written"):
        load_tensors(path)


def test_a_file_of_others_has_no_checksum(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "t.safetensors", {"by": "somebody"})
    tensors, metadata = load_tensors(tmp_path / "t.safetensors")
    assert metadata == {"by": "somebody"}
    assert CHECKSUM not in metadata
    assert tensors["a"].tolist() == [1, 1, 1]


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path, monkeypatch):
    write_json(tmp_path / "t.safetensors", {})

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SpdError, match=r"t\.safetensors: cannot be read: Permission denied"):
        load_tensors(tmp_path / "t.safetensors")
