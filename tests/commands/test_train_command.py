"""`spd train`: a toy, its metrics, and its training interrupted and gone on with."""

from __future__ import annotations

import json
import signal

import pytest
from command_runs import bits, interrupt_after, line_of, steps
from small_runs import TOY, one_line

from spdcli.files import load_tensors
from spdcli.runs.directory import TOY_WEIGHTS, RunDirectory


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
        f"hint: spd train {out}/recipe.toml --out {out} --resume goes on there\n"
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
