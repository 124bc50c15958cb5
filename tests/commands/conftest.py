"""Runs for the commands: recipes of a toy and of a tiny model, and what `spd decompose` makes of them."""

from __future__ import annotations

import pytest
from small_runs import MODEL, TOY, save_toy, spd_here, toy_recipe


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


@pytest.fixture
def toy_recipe_file(tmp_path):
    (tmp_path / "toy.toml").write_text(TOY)
    return tmp_path / "toy.toml"


@pytest.fixture
def straight(spd, recipe, tmp_path):
    """Eight steps in one go."""
    assert spd("decompose", recipe, "--out", tmp_path / "straight")[0] == 0
    return tmp_path / "straight"
