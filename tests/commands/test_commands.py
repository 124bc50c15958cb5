"""`spd train`, `decompose`, `eval` and `inspect`, from the command line to the files and back."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_runs import MODEL, ROOT, TOY, one_line, save_toy, spd_here, spd_process, toy_recipe

import spdcli
from spdcli.engine.fit import fit
from spdcli.engine.forward import clean_pass
from spdcli.engine.tables import losses_where
from spdcli.errors import NotFinite
from spdcli.files import load_tensors
from spdcli.runs.directory import CHECKPOINT, DECOMPOSITION, TOY_WEIGHTS, RunDirectory
from spdcli.runs.opening import flat

GIB = 2**30
WORSE = "warning: this decomposition is worse than none: recon is "  # a random toy after eight steps


@pytest.fixture
def spd(monkeypatch, capsys):
    return spd_here(monkeypatch, capsys)


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose toy is already there, so that runs begin at once."""
    trained = save_toy(tmp_path / "trained", toy_recipe(folder=tmp_path))
    path = tmp_path / "small.toml"
    path.write_text(TOY.replace('"induction"', f'"induction"\npath = "{trained}"'))
    return path


@pytest.fixture
def model_recipe_file(tmp_path, tiny_gpt2_dir):
    path = tmp_path / "model.toml"
    path.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)))
    return path


@pytest.fixture
def model_run(spd, model_recipe_file, tmp_path):
    assert spd("decompose", model_recipe_file, "--out", tmp_path / "run")[0] == 0
    return tmp_path / "run"


def bits(run: Path) -> bytes:
    return (run / DECOMPOSITION).read_bytes()


def steps(run: Path) -> list[int]:
    return [record["step"] for record in RunDirectory(run).metrics()]


def trained(run: Path) -> list[dict]:
    """The metrics but for the time they took."""
    return [{key: value for key, value in r.items() if key != "seconds"} for r in RunDirectory(run).metrics()]


def line_of(path: Path, text: str) -> int:
    return next(n for n, line in enumerate(path.read_text().splitlines(), 1) if line.startswith(text))


# --- train -----------------------------------------------------------------------------------------


def test_train_leaves_a_toy_its_metrics_and_its_curve(spd, tmp_path):
    (tmp_path / "toy.toml").write_text(TOY)
    out = tmp_path / "toy"
    code, printed, err = spd("train", tmp_path / "toy.toml", "--out", out)
    assert code == 0
    assert printed.splitlines()[-1] == str(out)
    assert "warning: the toy is right on only" in err  # four steps teach nothing
    assert steps(out) == [1, 2, 4]
    assert {file.name for file in out.iterdir()} == {
        "recipe.toml", "metrics.jsonl", "target.safetensors", "checkpoint", "figures",
    }  # fmt: skip
    code, printed, _ = spd("train", tmp_path / "toy.toml", "--out", out, "--force", "--json", "--seed", 5)
    data = json.loads(printed)
    assert (data["schema"], data["steps"], data["run"]) == ("spd.train/1", 4, str(out))
    assert 0 <= data["accuracy"] <= 1
    assert RunDirectory(out).recipe.seed == 5


def test_only_a_toy_is_trained(spd, tmp_path, model_recipe_file):
    out = tmp_path / "toy"
    code, printed, err = spd("train", model_recipe_file, "--out", out)
    assert (code, printed) == (2, "")
    one_line(err, f"{model_recipe_file}:{line_of(model_recipe_file, 'kind')}: [target] kind = 'huggingface'")
    assert not out.exists()


def test_a_toy_that_is_only_named_is_not_trained(spd, recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("[train]\nbatch = 8\nsteps = 4\nlog_every = 2\n", ""))
    code, _, err = spd("train", recipe, "--out", tmp_path / "toy")
    assert code == 2
    one_line(err, str(recipe), "[train] is missing")


def test_a_toy_that_diverges_is_one_line(spd, tmp_path):
    (tmp_path / "toy.toml").write_text(TOY)
    code, _, err = spd("train", tmp_path / "toy.toml", "--out", tmp_path / "toy", "--set", "train.learning_rate=1e30")
    assert code == 1
    one_line(err, "training the toy: the loss is nan at step 2", "lower train.learning_rate")


@pytest.fixture
def toy_recipe_file(tmp_path):
    (tmp_path / "toy.toml").write_text(TOY)
    return tmp_path / "toy.toml"


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM], [signal.SIGHUP]])
def test_a_toy_s_training_is_saved_and_resumed_bit_for_bit(spd, toy_recipe_file, tmp_path, monkeypatch, numbers):
    whole, out = tmp_path / "whole", tmp_path / "toy"
    assert spd("train", toy_recipe_file, "--out", whole)[0] == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, *numbers)
        code, printed, err = spd("train", toy_recipe_file, "--out", out)
    assert (code, printed) == (130, "")
    assert err == (
        f"interrupted: stopped after step 2 of 4 of the toy's training; everything is saved in {out}\n"
        "hint: the same command with --resume goes on there\n"
    )
    assert not (out / TOY_WEIGHTS).exists()
    assert spd("decompose", toy_recipe_file, "--out", out)[0] == 2  # it is kept from whatever else would begin there
    code, _, err = spd("train", toy_recipe_file, "--out", out, "--resume")
    assert code == 0
    assert "the toy's training goes on from step 2\n" in err
    assert (out / TOY_WEIGHTS).read_bytes() == (whole / TOY_WEIGHTS).read_bytes()
    assert RunDirectory(out).metrics() == RunDirectory(whole).metrics()
    assert (out / "figures" / "training.svg").exists()


def test_a_toy_is_saved_whatever_comes_meanwhile(spd, toy_recipe_file, tmp_path, monkeypatch):
    out = tmp_path / "toy"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4, signal.SIGINT, signal.SIGINT, name="save_checkpoint")
        assert spd("train", toy_recipe_file, "--out", out)[0] == 0
    assert (out / TOY_WEIGHTS).exists()


def test_a_finished_toy_is_trained_further(spd, toy_recipe_file, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "toy"
    further = ["--set", "train.steps=6"]
    assert spd("train", toy_recipe_file, "--out", whole, *further)[0] == 0
    assert spd("train", toy_recipe_file, "--out", out)[0] == 0
    assert spd("train", toy_recipe_file, "--out", out, "--resume", *further)[0] == 0
    assert (out / TOY_WEIGHTS).read_bytes() == (whole / TOY_WEIGHTS).read_bytes()


def test_a_killed_training_of_a_toy_leaves_its_last_checkpoint(spd, toy_recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("spdcli.runs.training.TOY_CHECKPOINT_EVERY", 2)
    monkeypatch.setattr("spdcli.runs.training.save_tensors", lambda *_: 1 / 0)  # where it dies, the weights unwritten
    out = tmp_path / "toy"
    assert spd("train", toy_recipe_file, "--out", out, "--set", "train.steps=5")[0] == 1
    assert [load_tensors(path)[1]["step"] for path in sorted((out / "checkpoint").iterdir())] == ["4", "5"]


def test_a_decomposition_goes_on_with_the_training_of_its_toy(spd, toy_recipe_file, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert spd("decompose", toy_recipe_file, "--out", whole)[0] == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, signal.SIGTERM)
        code, _, err = spd("decompose", toy_recipe_file, "--out", out)
    assert code == 130
    assert f"everything is saved in {out / 'toy'}\n" in err
    code, _, err = spd("decompose", toy_recipe_file, "--out", out, "--resume")
    assert code == 0
    assert "the toy's training goes on from step 2\n" in err
    assert bits(out) == bits(whole)


# --- decompose -------------------------------------------------------------------------------------


def test_decompose_trains_its_toy_first(spd, tmp_path):
    (tmp_path / "toy.toml").write_text(TOY)
    out = tmp_path / "run"
    code, printed, err = spd("decompose", tmp_path / "toy.toml", "-o", out)
    assert code == 0
    assert printed.splitlines()[-1] == str(out)
    assert printed.startswith("total loss ")
    assert f"toy trained into {out / 'toy'}" in err
    assert steps(out) == list(range(1, 9))
    assert steps(out / "toy") == [1, 2, 4]
    assert {file.name for file in out.iterdir()} == {
        "recipe.toml", "metrics.jsonl", "decomposition.safetensors", "checkpoint", "toy", "target.json",
    }  # fmt: skip
    last = RunDirectory(out).metrics()[-1]
    assert last["losses"].keys() == {
        "stochastic_recon", "stochastic_recon_partial", "recon_layerwise", "faithfulness", "minimality",
    }  # fmt: skip
    assert last["active"].keys() == {"Q0", "K0", "V0", "Q1", "K1", "V1"}
    assert last["gradients"].keys() == {"slices", "gates"}
    weights = {"stochastic_recon": 1, "stochastic_recon_partial": 1, "recon_layerwise": 0.5, "faithfulness": 10}
    total = sum(weight * last["losses"][name] for name, weight in weights.items()) + 0.2 * last["losses"]["minimality"]
    assert last["total"] == pytest.approx(total)


def test_json_is_one_object_and_quiet_is_one_path(spd, recipe, tmp_path):
    code, printed, err = spd("decompose", recipe, "--out", tmp_path / "a", "--json")
    assert (code, err) == (0, "")
    data = json.loads(printed)
    assert (data["schema"], data["run"], data["step"]) == ("spd.decompose/1", str(tmp_path / "a"), 8)
    assert spd("decompose", recipe, "--out", tmp_path / "b", "-q") == (0, f"{tmp_path / 'b'}\n", "")


def test_the_path_of_a_run_can_be_handed_on(recipe, tmp_path):
    script = f'spd() {{ "{sys.executable}" -m spdcli "$@"; }}; spd inspect "$(spd decompose "$1" --out "$2" -q)" -t s'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-ec", script, "bash", str(recipe), str(tmp_path / "a run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("'s' at position") == 8
    assert done.stderr == ""


def test_a_run_is_not_overwritten_unless_forced(spd, recipe, tmp_path):
    out = tmp_path / "run"
    assert spd("decompose", recipe, "--out", out)[0] == 0
    before = bits(out)
    code, _, err = spd("decompose", recipe, "--out", out, "--seed", 8)
    assert code == 2
    one_line(err, f"{out} holds another run", "--force", "--resume")
    assert bits(out) == before
    code, _, err = spd("decompose", recipe, "--out", out, "--force", "--resume")
    assert code == 2
    one_line(err, "--resume and --force contradict each other")
    assert spd("decompose", recipe, "--out", out, "--seed", 8, "--force")[0] == 0
    assert bits(out) != before
    assert spd("decompose", recipe, "--out", out, "--force")[0] == 0
    assert bits(out) == before  # the same recipe and seed: the same run


def test_a_directory_of_something_else_is_never_touched(spd, recipe, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("mine")
    for options in ([], ["--force"], ["--resume"]):
        code, _, err = spd("decompose", recipe, "--out", out, *options)
        assert code == 2
        assert "is not empty and holds no run" in err
    assert [file.name for file in out.iterdir()] == ["chapter.tex"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("V7", "the nearest are V1, V0"), ("blocks.*", "it has Q0, K0, V0 ...")],
)
def test_a_pattern_that_matches_nothing_is_blamed_on_its_line(spd, recipe, tmp_path, pattern, said):
    recipe.write_text(recipe.read_text().replace("[slices]", f'[slices]\nmatrices = [\n  "Q0",\n  "{pattern}",\n]'))
    code, _, err = spd("decompose", recipe, "--out", tmp_path / "run")
    assert code == 2
    line = line_of(recipe, f'  "{pattern}"')
    one_line(err, f"{recipe}:{line}: [slices] matrices: '{pattern}' matches no matrix of the target; {said}")


def test_a_refused_run_does_not_stand_in_the_way_of_the_next(spd, recipe, tmp_path):
    out = tmp_path / "run"
    assert spd("decompose", recipe, "--out", out, "--set", "target.path=nowhere")[0] == 2
    assert spd("decompose", recipe, "--out", out)[0] == 0


def test_too_large_a_decomposition_is_refused_before_it_is_made(spd, recipe, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("spdcli.runs.learning.start_decomposition", lambda *_: made.append(1))
    monkeypatch.setattr("spdcli.costs.room.free_bytes", lambda device: 2**60)
    monkeypatch.setattr("spdcli.runs.learning.free_bytes", lambda device: 3 * GIB)
    code, _, err = spd("decompose", recipe, "--out", tmp_path / "run", "--set", "slices.C=1000000")
    assert (code, made) == (1, [])
    slices = 6 * 1_000_000 * 16  # six matrices, 8 + 8 numbers a slice
    gates = 6 * 1_000_000 * (4 * 16 + 4 + 4 + 1)  # each gate reads 16 numbers: w1, b1, w2, b2
    needed = round(4 * 4 * (slices + gates) / GIB)
    one_line(
        err, f"{slices // 10**6} million slice and {gates // 10**6} million gate", f"{needed} GiB", "3 GiB are free"
    )
    assert "importance.basis" not in err  # which is for vector gates


# --- the toy of a run ------------------------------------------------------------------------------


def test_a_trained_toy_is_copied_and_not_trained_again(spd, recipe, tmp_path):
    """From `spd train`, or from another run's toy; the run keeps a copy and does not need the original."""
    assert spd("decompose", recipe, "--out", tmp_path / "a")[0] == 0
    assert spd("decompose", recipe, "--out", tmp_path / "b", "--set", f"target.path={tmp_path / 'a'}")[0] == 0
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    (tmp_path / "trained" / "target.safetensors").unlink()
    for run in "ab":
        assert [file.name for file in (tmp_path / run / "toy").iterdir()] == ["target.safetensors"]
        assert spd("inspect", tmp_path / run, "-t", "s")[0] == 0


def test_a_path_without_a_toy_is_blamed_on_its_line(spd, recipe, tmp_path):
    (tmp_path / "trained" / "target.safetensors").unlink()
    code, _, err = spd("decompose", recipe, "--out", tmp_path / "run")
    assert code == 2
    one_line(err, f"{recipe}:{line_of(recipe, 'path')}: [target] path: {tmp_path / 'trained'} holds no toy")


def test_a_toy_of_another_shape_is_refused(spd, recipe, tmp_path):
    code, _, err = spd("decompose", recipe, "--out", tmp_path / "run", "--set", "target.vocabulary=9")
    assert code == 1
    one_line(err, "trained/target.safetensors: 'embed.weight' has the shape [7, 8], not [10, 8]")


# --- resume ----------------------------------------------------------------------------------------


@pytest.fixture
def straight(spd, recipe, tmp_path):
    """Eight steps in one go."""
    assert spd("decompose", recipe, "--out", tmp_path / "straight")[0] == 0
    return tmp_path / "straight"


def interrupt_after(monkeypatch, step: int, *numbers: int, name: str = "add_metrics") -> None:
    """Sends the signals `numbers` while the record of `step` is written, or in whatever else `name` does."""
    write = getattr(RunDirectory, name)

    def press(run, *arguments):
        write(run, *arguments)
        if run.metrics()[-1]["step"] == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(RunDirectory, name, press)


@pytest.mark.parametrize("step", [1, 3, 7])
def test_ctrl_c_saves_and_resume_goes_on_bit_for_bit(spd, recipe, straight, tmp_path, monkeypatch, step):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, step, signal.SIGINT)
        code, printed, err = spd("decompose", recipe, "--out", out)
    assert (code, printed) == (130, "")
    assert err == (
        f"interrupted: stopped after step {step} of 8; everything is saved in {out}\n"
        "hint: the same command with --resume goes on there\n"
    )
    assert steps(out) == list(range(1, step + 1))
    assert spdcli.load(out).decomposition.names  # what is there can be looked at
    assert bits(out) != bits(straight)
    code, printed, err = spd("decompose", recipe, "--out", out, "--resume")
    assert (code, printed.splitlines()[-1]) == (0, str(out))
    assert f"going on from step {step}\n" in err
    assert bits(out) == bits(straight)
    assert trained(out) == trained(straight)


def test_a_second_ctrl_c_does_not_wait(spd, recipe, straight, tmp_path, monkeypatch):
    """It leaves the last checkpoint; the steps since then are done again, once in the metrics."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, signal.SIGINT, signal.SIGINT)
        code, printed, err = spd("decompose", recipe, "--out", out)
    assert (code, printed) == (130, "")
    assert err.splitlines()[0] == f"interrupted: stopped at once; {out} is as it was last saved"
    assert steps(out) == [1, 2, 3, 4, 5]
    _, _, err = spd("decompose", recipe, "--out", out, "--resume")
    assert "going on from step 4\n" in err
    assert bits(out) == bits(straight)
    assert trained(out) == trained(straight)


STOPS = [signal.SIGTERM, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("add_metrics", STOPS), ("save_checkpoint", STOPS), ("save_checkpoint", [signal.SIGINT, signal.SIGINT])],
)
def test_what_is_told_to_stop_again_and_again_saves(spd, recipe, straight, tmp_path, monkeypatch, name, numbers):
    """In the step and in the save: of queues that send a second SIGTERM, and of terminals that go."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6, *numbers, name=name)
        code, _, err = spd("decompose", recipe, "--out", out)
    assert code == 130
    assert f"stopped after step 6 of 8; everything is saved in {out}\n" in err
    assert spd("decompose", recipe, "--out", out, "--resume")[0] == 0
    assert bits(out) == bits(straight)


@contextmanager
def heard(number):
    """Python's own answer to Ctrl-C, which a shell takes from what it starts in the background."""
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_ctrl_c_before_the_first_step_says_so(spd, recipe, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, heard(signal.SIGINT):
        patch.setattr("spdcli.runs.learning.start_decomposition", lambda *_: signal.raise_signal(signal.SIGINT))
        code, _, err = spd("decompose", recipe, "--out", out)
    assert code == 130
    assert "--resume goes on from there" in err
    code, _, err = spd("decompose", recipe, "--out", out, "--resume")
    assert code == 0
    assert "toy trained" not in err  # it was finished, and is kept
    assert steps(out) == list(range(1, 9))


def test_ctrl_c_before_anything_is_there_leaves_nothing(spd, model_recipe_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, heard(signal.SIGINT):
        patch.setattr("spdcli.runs.learning.start_decomposition", lambda *_: signal.raise_signal(signal.SIGINT))
        code, _, err = spd("decompose", model_recipe_file, "--out", out)
    assert (code, err.splitlines()[0]) == (130, "interrupted: stopped; nothing was kept")
    assert not out.exists()


def test_a_finished_run_without_its_checkpoint_is_not_resumed(spd, model_run, model_recipe_file):
    shutil.rmtree(model_run / "checkpoint")
    before = {path: path.read_bytes() for path in model_run.iterdir()}
    code, _, err = spd("decompose", model_recipe_file, "--out", model_run, "--resume")
    assert code == 1
    one_line(err, "no checkpoint to go on from; there is recipe.toml, metrics.jsonl up to step 2, decomposition.safe")
    assert {path: path.read_bytes() for path in model_run.iterdir()} == before


def test_somebody_s_own_recipe_is_not_replaced(spd, model_recipe_file, monkeypatch):
    mine = model_recipe_file.rename(model_recipe_file.with_name("recipe.toml"))
    monkeypatch.chdir(mine.parent)
    before = mine.read_bytes()
    code, _, err = spd("decompose", "recipe.toml", "--out", ".")
    assert code == 2
    one_line(err, ". is not empty and holds no run; recipe.toml is not one of spd's")
    assert mine.read_bytes() == before


def test_the_signals_of_the_process_are_put_back(spd, recipe, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert spd("decompose", recipe, "--out", tmp_path / "run")[0] == 0
    assert [signal.getsignal(number) for number in numbers] == before


LONG = ["--set", "decompose.steps=120", "--set", "decompose.checkpoint_every=10"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_process_that_is_stopped_can_be_resumed(spd, recipe, tmp_path, number):
    """SIGTERM as Ctrl-C; SIGKILL leaves the last checkpoint, whole."""
    out = tmp_path / "run"
    process = spd_process("decompose", recipe, "--out", out, *LONG)
    deadline = time.monotonic() + 300
    while not ((out / DECOMPOSITION).exists() and len(steps(out)) > 14):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    for option in ("--resume", "--force"):  # nobody else may write meanwhile
        code, _, err = spd("decompose", recipe, "--out", out, *LONG, option)
        assert code == 1
        assert f"is being written by process {process.pid} of " in err
    process.send_signal(signal.SIGCONT)
    process.send_signal(number)
    _, err = process.communicate()
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert "interrupted: stopped after step " in err
        assert "hint: the same command with --resume goes on there\n" in err
        assert "Traceback" not in err
    else:
        assert process.returncode == -number
    assert 15 <= len(steps(out)) < 120
    assert spdcli.load(out).decomposition.names
    assert spd("inspect", out, "-t", "s")[0] == 0

    assert spd("decompose", recipe, "--out", out, *LONG, "--resume")[0] == 0
    assert spd("decompose", recipe, "--out", tmp_path / "straight", *LONG)[0] == 0
    assert bits(out) == bits(tmp_path / "straight")
    assert trained(out) == trained(tmp_path / "straight")


@pytest.mark.parametrize(
    ("setting", "before"),
    [
        ("slices.C=6", "5"),
        ("importance.gate_width=5", "4"),
        ("seed=4", "3"),
        ('slices.matrices=["Q0"]', "['*']"),
        ("target.vocabulary=7", "6"),
    ],
)
def test_what_is_trained_cannot_change_on_the_way(spd, recipe, straight, setting, before):
    saved = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    code, _, err = spd("decompose", recipe, "--out", straight, "--resume", "--set", setting)
    assert code == 2
    key = setting.split("=")[0]
    one_line(err, f"{straight} was made with {key} = {before}, not ", f"spd decompose {straight}/recipe.toml")
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == saved


def test_losses_and_length_may_change_on_the_way(spd, recipe, straight):
    before = bits(straight)
    settings = ["--set", "losses.minimality=0.9", "--set", "decompose.steps=11"]
    code, _, err = spd("decompose", recipe, "--out", straight, "--resume", *settings)
    assert code == 0
    assert "losses.minimality changes from 0.2 to 0.9\n" in err
    assert steps(straight) == list(range(1, 12))
    assert bits(straight) != before
    assert RunDirectory(straight).recipe.losses.minimality == 0.9
    # What the hint of a refusal says: the run's own recipe goes on with its own settings.
    done = bits(straight)
    assert spd("decompose", straight / "recipe.toml", "--out", straight, "--resume")[0] == 0
    assert bits(straight) == done


def test_resume_does_not_take_a_trained_toy_for_a_run(spd, recipe, tmp_path):
    out = tmp_path / "toy"
    assert spd("train", recipe, "--out", out, "-q")[0] == 0
    saved = (out / "target.safetensors").read_bytes()
    code, _, err = spd("decompose", recipe, "--out", out, "--resume")
    assert code == 2
    one_line(err, f"{out} holds a toy and no decomposition", f"--set target.path={out}")
    assert (out / "target.safetensors").read_bytes() == saved


def test_a_loss_that_is_not_finite_loses_nothing(spd, recipe, straight):
    """The step before is saved. Where it was that step which spoilt the parameters, the next run finds that out, and
    goes on from the checkpoint before; the decomposition for readers is of that one all along."""
    saved, shown = (straight / CHECKPOINT).read_bytes(), bits(straight)
    settings = ["--set", "decompose.steps=16", "--set", "decompose.checkpoint_every=100"]
    resume = ["decompose", recipe, "--out", straight, "--resume", *settings]
    code, _, err = spd(*resume, "-q", "--set", "decompose.learning_rate=1e30")
    assert code == 1
    one_line(err, "step 10: loss recon_layerwise is nan", "lower decompose.learning_rate")
    assert load_tensors(straight / CHECKPOINT)[1]["step"] == "9"
    assert RunDirectory(straight).checkpoint_before.read_bytes() == saved
    assert bits(straight) == shown
    assert steps(straight) == list(range(1, 10))

    code, _, err = spd(*resume, "--set", "losses.minimality=1e308")
    assert code == 1
    assert RunDirectory(straight).checkpoint_before.read_bytes() == saved  # tried in vain, and not lost

    code, _, err = spd(*resume)
    assert code == 0
    assert "going on from step 9\n" in err
    assert "warning: step 10: loss recon_layerwise is nan" in err
    assert ": going on from step 8, the checkpoint before\n" in err
    assert steps(straight) == list(range(1, 17))


def test_a_sound_step_before_a_loss_that_is_not_finite_is_gone_on_from(spd, recipe, straight, monkeypatch):
    """As after a batch that overflows."""
    settings = ["--set", "decompose.steps=12", "--set", "decompose.checkpoint_every=100"]
    resume = ["decompose", recipe, "--out", straight, "--resume", *settings]

    def break_off(*arguments):
        for number, record in enumerate(fit(*arguments)):
            if number == 2:
                raise NotFinite("step 11: loss x is nan", "hint", 11)
            yield record

    with monkeypatch.context() as patch:
        patch.setattr("spdcli.runs.learning.fit", break_off)
        assert spd(*resume)[0] == 1
    code, _, err = spd(*resume)
    assert code == 0
    assert "going on from step 10\n" in err
    assert "warning" not in err
    assert steps(straight) == list(range(1, 13))


# --- load ------------------------------------------------------------------------------------------


def test_load_gives_what_the_commands_use(spd, recipe, straight):
    run = spdcli.load(str(straight))
    tensors, _ = load_tensors(straight / DECOMPOSITION)
    state = run.decomposition.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert flat(run.recipe.model_dump()) == flat(RunDirectory(straight).recipe.model_dump())
    occurrence = json.loads(spd("inspect", straight, "--token", "s", "--json")[1])["occurrences"][0]
    tokens = torch.tensor([[6 if word == "s" else int(word) for word in occurrence["text"].split()]])
    batch = run.subject.batches(torch.Generator()).select(torch.tensor([0]))
    batch = type(batch)(tokens, batch.valid, batch.looked)
    with torch.no_grad():
        g, _ = run.decomposition.importance(clean_pass(run.subject.target, batch, run.decomposition.names).inputs)
    shown = {entry["slice"]: entry["importance"] for entry in occurrence["slices"]}
    there = {f"{m}:{c}": x for m, v in g.items() for c, x in enumerate(v[0, occurrence["position"]].tolist()) if x > 0}
    assert len(shown) == min(20, len(there))
    assert shown == pytest.approx({address: there[address] for address in shown}, abs=1e-6)


@pytest.mark.parametrize("command", [["eval"], ["inspect"], ["inspect", "--json"]], ids=" ".join)
def test_a_missing_run_is_one_line(spd, recipe, tmp_path, command):
    code, printed, err = spd(command[0], tmp_path / "nowhere", *command[1:])
    assert (code, printed) == (2, "")
    one_line(err, f"{tmp_path / 'nowhere'}: no run here")
    assert spd("train", recipe, "--out", tmp_path / "toy")[0] == 0
    code, printed, err = spd(command[0], tmp_path / "toy", *command[1:])
    assert (code, printed) == (2, "")
    one_line(err, f"{tmp_path / 'toy'} holds a trained toy and no decomposition")
    (tmp_path / "toy" / TOY_WEIGHTS).rename(tmp_path / "elsewhere")
    code, printed, err = spd(command[0], tmp_path / "toy", *command[1:])
    assert (code, printed) == (2, "")
    one_line(
        err, f"{tmp_path / 'toy'} is not finished: there is no decomposition.safetensors", "--force begins it anew"
    )


def test_an_unfinished_run_says_how_to_go_on(spd, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / DECOMPOSITION).unlink()
    code, _, err = spd("eval", run)
    assert code == 2
    one_line(err, f"{run} is not finished: there is no {DECOMPOSITION}")
    told = err.splitlines()[1].removeprefix("hint: ")
    assert told.endswith(f"--out {run} --resume goes on with it")
    assert spd(*told.removesuffix(" goes on with it").split()[1:])[0] == 0
    assert (run / DECOMPOSITION).read_bytes() == (straight / DECOMPOSITION).read_bytes()


# --- eval ------------------------------------------------------------------------------------------

METRICS = set(losses_where(lambda loss: loss.reported))


CONTRACT = ("unique", "total_active", "metrics", "standard_error", "attention_kl", "accuracy")


def check_contract(data):
    """What other programs rely on is there; more keys are welcome."""
    check_numbers({key: data[key] for key in CONTRACT})


def check_numbers(value, path=""):
    """Every number of a JSON answer is finite; only a standard error may be null."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        here = f"{path}.{key}"
        if isinstance(inner, dict | list):
            check_numbers(inner, here)
        elif isinstance(inner, int | float):
            assert math.isfinite(inner), here
        else:
            assert isinstance(inner, str) or here.startswith(".standard_error"), here


def test_eval_of_a_toy_keeps_the_contract(spd, straight):
    code, printed, err = spd("eval", straight, "--sequences", 20, "--json")
    assert code == 0
    assert err.startswith(WORSE)
    data = json.loads(printed)
    assert json.loads((straight / "eval.json").read_text()) == data
    assert (data["schema"], data["run"], data["target"], data["sequences"]) == (
        "spd.eval/2", str(straight), "induction", 20,
    )  # fmt: skip
    names = ["Q0", "K0", "V0", "Q1", "K1", "V1"]
    assert list(data["active"]) == list(data["unique"]) == names
    assert all(set(classes) == {"s1", "m", "s2", "random"} for classes in data["active"].values())
    assert data["total_active"] == sum(data["unique"].values())
    assert set(data["metrics"]) == set(data["standard_error"]) == METRICS
    assert len(data["attention_kl"]) == 2
    assert set(data["accuracy"]) == {"target", "masked"}
    check_contract(data)


def test_eval_prints_table_1_beside_the_papers(spd, straight):
    code, printed, _ = spd("eval", straight, "--sequences", 20)
    assert code == 0
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    rows = {line.split()[1]: line for line in reversed(lines)}  # Table 1 comes before the circuit's tables
    assert {"Q0", "K0", "V0", "Q1", "K1", "V1", "faithfulness", "recon", "recon_layerwise"} <= rows.keys()
    assert "(5.053)" in rows["V1"]
    assert rows["V1"].rstrip().endswith("(11) │")
    assert "0.385" in printed
    assert printed.splitlines()[-1] == str(straight / "eval.json")
    code, printed, err = spd("eval", straight, "--sequences", 4, "-q")
    assert (code, printed) == (0, f"{straight / 'eval.json'}\n")
    assert err.startswith(WORSE)


def test_eval_takes_a_threshold_and_a_seed(spd, model_run):
    def measured(*options):
        data = json.loads(spd("eval", model_run, "--json", *options)[1])
        return data["total_active"], data["metrics"]["recon"], data["metrics"]["stochastic_recon"]

    active, recon, stochastic = measured()
    assert active > 0
    assert measured("--threshold", 1.0) == (0, recon, stochastic)
    assert measured("--seed", 0) == (active, recon, stochastic)  # the recipe's own
    assert measured("--seed", 1)[:2] == (active, recon)
    assert measured("--seed", 1)[2] != stochastic
    assert spd("eval", model_run, "--sequences", 1)[0] == 2


@pytest.mark.parametrize("prompts", [1, 2])
def test_eval_of_a_language_model_keeps_the_contract(spd, model_recipe_file, tmp_path, prompts):
    texts = ["Kobe Bryant plays professional basketball", "Tiger Woods plays the sport of golf"][:prompts]
    out = tmp_path / "run"
    assert spd("decompose", model_recipe_file, "--out", out, "--set", f"data.prompts={json.dumps(texts)}")[0] == 0
    code, printed, _ = spd("eval", out, "--json")
    assert code == 0
    data = json.loads(printed)
    assert (data["schema"], data["target"], data["sequences"]) == ("spd.eval/2", "huggingface", prompts)
    assert list(data["active_at"]) == ["h.1.attn.c_attn", "h.1.attn.c_proj", "h.1.mlp.c_fc", "h.1.mlp.c_proj"]
    places = [f"{prompt + 1}:{t}" for prompt in range(prompts) for t in range((5, 7)[prompt])]
    assert all(list(counts) == places for counts in data["active_at"].values())
    assert set(data["metrics"]) == set(data["standard_error"]) == METRICS
    assert (data["standard_error"]["recon"] is None) == (prompts == 1)
    assert set(data["cross_entropy"]) == set(data["accuracy"]) == {"target", "masked"}
    assert [answer["answer"] for answer in data["answers"]] == [" basketball", " golf"][:prompts]
    check_contract(data)
    code, printed, _ = spd("eval", out)
    assert code == 0
    for text in ("Bryant", "slices are active somewhere", "Probability of the answer", "Cross-entropy"):
        assert text in printed


# --- inspect ---------------------------------------------------------------------------------------


def test_inspect_keeps_the_contract(spd, model_run):
    code, printed, err = spd("inspect", model_run, "--token", "Bryant", "--json", "--top", 3, "--labels", 2)
    assert (code, err) == (0, "")
    data = json.loads(printed)
    assert (data["schema"], data["token"]) == ("spd.inspect/2", "Bryant")
    (occurrence,) = data["occurrences"]
    assert (occurrence["number"], occurrence["position"], occurrence["token"]) == (1, 2, " Bryant")
    assert len(occurrence["slices"]) == 3
    for entry in occurrence["slices"]:
        assert {"slice", "importance", "activation", "unique", "promotes", "reads"} <= entry.keys()
        assert isinstance(entry["unique"], bool)
        assert len(entry["reads"]) == 2
    check_numbers(data)


def test_inspect_for_people(spd, model_run):
    code, printed, _ = spd("inspect", model_run, "--token", "plays", "--matrix", "*c_fc", "--threshold", 0.2)
    assert code == 0
    assert printed.count("importance over prompt") == 2
    assert "' plays' at position 3 of prompt 1" in printed
    slices = [line.split("│")[1].strip(" *") for line in printed.splitlines() if line.startswith("│")]
    assert slices
    assert all(address.startswith("h.1.mlp.c_fc:") for address in slices)
    code, quiet, _ = spd("inspect", model_run, "--token", "plays", "--matrix", "*c_fc", "--threshold", 0.2, "-q")
    assert (code, quiet.split()) == (0, list(dict.fromkeys(slices)))
    nothing = spd("inspect", model_run, "-t", "plays", "--threshold", 1)[1]
    assert "No slice is active at position 3 of prompt 1: ' plays'\n" in nothing
    assert "No slice is active at position 3 of prompt 2: ' plays'\n" in nothing
    nothing = spd("inspect", model_run, "--threshold", 1)[1]
    assert "No slice is active at positions 0 to 4 of prompt 1: 'K' 'obe' ' Bryant' ' plays' ' professional'" in nothing


def test_inspect_of_another_text(spd, model_run):
    code, printed, err = spd("inspect", model_run, "-p", "Woods plays golf", "-p", "the sport", "--json", "-t", "plays")
    assert (code, err) == (0, "")
    data = json.loads(printed)
    assert [(o["number"], o["text"]) for o in data["occurrences"]] == [(1, "Woods plays golf")]


def test_inspect_warns_where_span_gates_look_outside_their_span(spd, model_recipe_file, tmp_path):
    out = tmp_path / "span"
    assert spd("decompose", model_recipe_file, "--out", out, "--set", "importance.basis=span")[0] == 0
    assert spd("inspect", out, "-q")[2] == ""
    assert "warning: this run's gates see only the span" in spd("inspect", out, "-q", "-p", "Woods plays golf")[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-t", "Jordan"], ("no prompt has the token 'Jordan'", "hint: the tokens are 'K'", "' Bryant'")),
        (["-t", "golf"], ("the token 'golf' is only an answer", "data.answers = 'fed'")),
        (["-m", "h.9.*"], ("no decomposed matrix matches 'h.9.*'", "the run has h.1.attn.c_attn")),
    ],
)
def test_what_inspect_cannot_find_is_one_line(spd, model_run, options, said):
    code, printed, err = spd("inspect", model_run, *options)
    assert (code, printed) == (2, "")
    one_line(err, *said)


# --- without the hub -------------------------------------------------------------------------------


def test_an_unreachable_hub_is_one_line_and_soon(tmp_path):
    began = time.monotonic()
    process = spd_process(
        *("decompose", ROOT / "recipes/gpt2.toml", "--out", tmp_path / "run"),
        HF_HUB_OFFLINE="",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path / "empty"),
    )
    printed, err = process.communicate()
    assert (process.returncode, printed) == (1, "")
    one_line(err, "the hub cannot be reached for 'openai-community/gpt2'", "a local directory", "a .gguf file")
    assert time.monotonic() - began < 30  # HUB_SECONDS, and two large imports on a machine that may be busy
