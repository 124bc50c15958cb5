"""Runs that were interrupted, and go on exactly there with `--resume`."""

from __future__ import annotations

import shutil
import signal
import time

import pytest
from command_runs import bits, heard, interrupt_after, steps, trained
from small_runs import one_line, spd_process

import spdcli
from spdcli.engine.fit import fit
from spdcli.errors import NotFinite
from spdcli.files import load_tensors
from spdcli.runs.directory import CHECKPOINT, DECOMPOSITION, RunDirectory


@pytest.mark.parametrize("step", [1, 3, 7])
def test_ctrl_c_saves_and_resume_goes_on_bit_for_bit(spd, recipe, straight, tmp_path, monkeypatch, step):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, step, signal.SIGINT)
        code, printed, err = spd("decompose", recipe, "--out", out)
    assert (code, printed) == (130, "")
    assert err == (
        f"interrupted: stopped after step {step} of 8; everything is saved in {out}\n"
        f"hint: spd decompose {out}/recipe.toml --out {out} --resume goes on there\n"
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
        assert f"hint: spd decompose {out}/recipe.toml --out {out} --resume goes on there\n" in err
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
    warning, *failure = err.splitlines()
    assert warning.startswith("warning: step 9: a step moves the numbers of U and V by about")
    one_line("\n".join(failure), "step 10: loss recon_layerwise is nan", "lower decompose.learning_rate")
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
