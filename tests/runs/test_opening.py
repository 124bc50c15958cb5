"""What is there is neither removed nor replaced unless that was asked for, and a run has one writer."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from small_runs import toy_recipe

from spdcli.errors import SpdError, UsageError
from spdcli.files import save_tensors
from spdcli.progress import silent
from spdcli.runs.directory import (
    CHECKPOINT,
    DECOMPOSITION,
    EVAL,
    METRICS,
    RECIPE,
    TOY,
    TOY_CHECKPOINT,
    TOY_WEIGHTS,
    RunDirectory,
    ToyDirectory,
)
from spdcli.runs.lock import LOCK
from spdcli.runs.opening import opened_run

MINE = "# my notes, written by hand\n"


@pytest.fixture
def recipe(tmp_path):
    return toy_recipe(folder=tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def a_run(path: Path, recipe, *names: str) -> RunDirectory:
    """A run that holds the files `names`."""
    run = RunDirectory.create(path, recipe)
    for name in names:
        save_tensors(run / name, {"a": torch.zeros(1)})
    return run


def begin(run, recipe, **options) -> None:
    with opened_run(run, recipe, **options):
        pass


# --- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "recipe.toml"),
        ([DECOMPOSITION, EVAL], "recipe.toml, eval.json, decomposition.safetensors"),
        ([DECOMPOSITION, f"{TOY}/{TOY_WEIGHTS}"], "recipe.toml, decomposition.safetensors, toy"),
        ([EVAL, f"{TOY}/{TOY_CHECKPOINT}"], "recipe.toml, eval.json, toy"),
    ],
)
def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path, recipe, names, said):
    run = a_run(tmp_path / "run", recipe, *names)
    before = files(run.path)
    with pytest.raises(SpdError, match=f"no checkpoint to go on from; there is {said}$") as info:
        begin(run, recipe, resume=True)
    assert "--force begins it anew and replaces that" in info.value.hint
    assert files(run.path) == before


def test_metrics_alone_are_told_by_their_step(tmp_path, recipe):
    run = a_run(tmp_path / "run", recipe)
    run.add_metrics({"step": 7})
    with pytest.raises(SpdError, match=r"there is recipe\.toml, metrics\.jsonl up to step 7$"):
        begin(run, recipe, resume=True)


def test_where_nothing_is_nothing_is_made(tmp_path, recipe):
    with pytest.raises(SpdError, match="no run to go on with") as info:
        begin(RunDirectory(tmp_path / "run"), recipe, resume=True)
    assert info.value.exit_code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", [CHECKPOINT, "checkpoint/state-before.safetensors", f"{TOY}/{TOY_WEIGHTS}", f"{TOY}/{TOY_CHECKPOINT}"]
)
def test_what_a_run_can_go_on_from(tmp_path, recipe, name):
    run = a_run(tmp_path / "run", recipe, name)
    before = files(run.path)
    begin(run, recipe, resume=True)
    assert files(run.path) == before


@pytest.mark.parametrize("name", [TOY_WEIGHTS, TOY_CHECKPOINT])
def test_a_toy_is_no_decomposition_to_go_on_with(tmp_path, recipe, name):
    run = a_run(tmp_path / "toy", recipe, name)
    with pytest.raises(UsageError, match="holds a toy and no decomposition"):
        begin(run, recipe, resume=True)


@pytest.mark.parametrize(
    ("change", "refused"),
    [("train.steps=9", False), ("train.learning_rate=0.5", False), ("slices.C=3", False), ("seed=9", True)],
)
def test_a_toy_goes_on_with_another_training(tmp_path, recipe, change, refused):
    run = ToyDirectory.create(tmp_path / "toy", recipe)
    save_tensors(run / TOY_CHECKPOINT, {"a": torch.zeros(1)})
    changed = toy_recipe(change, folder=tmp_path)
    if refused:
        with pytest.raises(UsageError, match="was made with seed = 3, not 9") as info:
            begin(run, changed, resume=True)
        assert info.value.hint.startswith(f"spd train {run}/recipe.toml --out {run} --resume")
        assert run.recipe == recipe
    else:
        begin(run, changed, resume=True)
        assert run.recipe == changed


def test_notes_in_a_recipe_survive_a_resumption(tmp_path, recipe):
    run = a_run(tmp_path / "run", recipe, CHECKPOINT)
    text = (run / RECIPE).read_text() + MINE
    (run / RECIPE).write_text(text)
    begin(run, recipe, resume=True)
    assert (run / RECIPE).read_text() == text


def test_a_run_that_goes_on_under_other_conditions_is_told(tmp_path, recipe):
    """Sums are cut by threads, so that their number decides the last digits; so do other versions."""
    run = a_run(tmp_path / "run", recipe, CHECKPOINT)
    assert run.conditions["threads"] == str(torch.get_num_threads())
    heard = []
    begin(run, recipe, resume=True, report=heard.append)
    assert heard == []
    written = (run / RECIPE).read_text()
    older = re.sub("(?m)^# torch: .*$", "# torch: 2.6.0", written).replace("# threads: 1\n", "# threads: 64\n")
    (run / RECIPE).write_text(older)
    begin(run, recipe, resume=True, report=heard.append)
    assert [progress.text.removeprefix(f"{run} was made with ") for progress in heard] == [
        f"torch 2.6.0, and goes on with {torch.__version__}: its last digits depend on that",
        "threads 64, and goes on with 1: its last digits depend on that",
    ]
    assert all(progress.warning for progress in heard)
    assert (run / RECIPE).read_text() == written
    (run / RECIPE).write_text(written.replace("# threads: 1\n", ""))  # as older runs have it
    begin(run, recipe, resume=True, report=heard.append)
    assert len(heard) == 2


# --- a new run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
def test_a_recipe_that_somebody_wrote_is_never_replaced(tmp_path, recipe, force):
    """As by `spd decompose recipe.toml --out .`."""
    place = tmp_path / "project"
    place.mkdir()
    (place / RECIPE).write_text(MINE + (tmp_path / "toy.toml").read_text())
    before = files(place)
    with pytest.raises(UsageError, match=r"holds no run; recipe\.toml is not one of spd's"):
        begin(RunDirectory(place), recipe, force=force)
    assert files(place) == before


def test_a_recipe_of_another_run_is_replaced_by_force_alone(tmp_path, recipe):
    run = a_run(tmp_path / "run", recipe)
    other = toy_recipe("seed=9", folder=tmp_path)
    before = files(run.path)
    with pytest.raises(UsageError, match="holds another run"):
        begin(run, other)
    assert files(run.path) == before
    with opened_run(run, other, force=True):
        assert run.recipe == other


@pytest.mark.parametrize("error", [SpdError("a model that is not there"), KeyboardInterrupt(), ZeroDivisionError()])
def test_a_run_that_comes_to_nothing_leaves_nothing(tmp_path, recipe, error):
    run = RunDirectory(tmp_path / "deep" / "run")

    def break_off():
        with opened_run(run, recipe):
            assert {file.name for file in run.path.iterdir()} == {RECIPE, LOCK}
            run.start_metrics()
            raise error

    with pytest.raises(type(error)):
        break_off()
    assert not run.path.exists()


def test_what_was_trained_until_an_error_stays(tmp_path, recipe):
    run = RunDirectory(tmp_path / "run")

    def break_off():
        with opened_run(run, recipe):
            run.add_metrics({"step": 1})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert set(files(run.path)) == {RECIPE, METRICS}


# --- one writer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"resume": True}, {"force": True}])
def test_a_run_that_is_being_written_is_left_alone(tmp_path, recipe, options):
    """By another thread, as by another process; `reproduce` and `compare` replace runs likewise."""
    from concurrent.futures import ThreadPoolExecutor

    run = a_run(tmp_path / "run", recipe, CHECKPOINT)
    with opened_run(run, recipe, resume=True), ThreadPoolExecutor(1) as pool:
        before = files(run.path)
        with pytest.raises(SpdError, match="is being written by process "):
            pool.submit(begin, RunDirectory(run.path), recipe, **options).result()
        with pytest.raises(SpdError, match="is being written by process "):
            pool.submit(RunDirectory.create, run.path, recipe, True).result()
        assert files(run.path) == before


def test_the_lock_of_a_dead_process_is_told(tmp_path, recipe):
    run = a_run(tmp_path / "run", recipe, CHECKPOINT)
    (run / LOCK).write_text('{"user": "me", "host": "here", "pid": 7, "since": "noon"}')
    told = []
    begin(run, recipe, resume=True, report=lambda progress: told.append(progress.text))
    assert told == [f"{run}: the lock of process 7 of me on here, since noon, was left behind and is taken over"]
    begin(run, recipe, resume=True, report=silent)


def test_what_a_killed_writer_left_in_a_run_goes(tmp_path, recipe):
    import socket

    run = a_run(tmp_path / "run", recipe, CHECKPOINT, f"{TOY}/{TOY_CHECKPOINT}")
    left = [run / name / f".spd-{2**22 + 1}-{socket.gethostname()}-x.part" for name in (".", "checkpoint", TOY)]
    for folder in left:
        folder.mkdir()
    begin(run, recipe, resume=True)
    assert not any(folder.exists() for folder in left)


# --- links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["figures", "checkpoint", TOY, f"{TOY}/checkpoint"])
def test_nothing_is_written_through_a_link_of_somebodys_run(tmp_path, recipe, name):
    run = a_run(tmp_path / "run", recipe, CHECKPOINT, f"{TOY}/{TOY_WEIGHTS}")
    outside = tmp_path / "outside"
    if (run / name).exists():
        (run / name).rename(outside)
    else:
        outside.mkdir()
    (run / name).symlink_to(outside)
    before = files(outside)
    for attempt in (lambda: begin(run, recipe, resume=True), lambda: RunDirectory.open(run.path)):
        with pytest.raises(SpdError, match=f"{name}: a link out of the run"):
            attempt()
    begin(run, recipe, force=True)
    assert not (run / name).is_symlink()
    assert files(outside) == before


@pytest.mark.parametrize("name", [METRICS, LOCK])
def test_nor_through_a_file(tmp_path, recipe, name):
    run = a_run(tmp_path / "run", recipe, CHECKPOINT)
    (tmp_path / "outside").write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "outside")

    def write():
        with opened_run(run, recipe, resume=True):
            run.add_metrics({"step": 1})

    with pytest.raises(SpdError, match="cannot be written"):
        write()
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path, recipe):
    run = a_run(tmp_path / "run", recipe, CHECKPOINT)
    os.mkfifo(run / LOCK)
    with pytest.raises(SpdError, match="not a file of spd's"):
        begin(run, recipe, resume=True)
