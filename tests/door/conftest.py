"""Runs of a small toy and of a tiny GPT-2, made by the Python door: in memory, and one in a directory."""

from __future__ import annotations

import json

import pytest
from small_runs import MODEL, TOY, save_toy, spd_here, toy_recipe

import spdcli


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The small toy recipe as a file, its toy there already."""
    folder = tmp_path_factory.mktemp("door")
    toy = save_toy(folder / "toy", toy_recipe(folder=folder))
    path = folder / "small.toml"
    path.write_text(TOY.replace('kind = "induction"', f'kind = "induction"\npath = "{toy}"'))
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory, tiny_gpt2_dir):
    path = tmp_path_factory.mktemp("model") / "model.toml"
    path.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)))
    return path


@pytest.fixture(scope="module")
def language_run(model_file):
    return spdcli.decompose(model_file)


@pytest.fixture(scope="module")
def toy_run(recipe):
    return spdcli.decompose(recipe)


@pytest.fixture(scope="module")
def saved_run(model_file, tmp_path_factory):
    return spdcli.decompose(model_file, tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def answer(saved_run, monkeypatch, capsys):
    """The JSON of a command on the saved run."""

    def run(command, *options):
        code, out, err = spd_here(monkeypatch, capsys)(command, saved_run.home.path, *options, "--json")
        assert code == 0, err
        return json.loads(out)

    return run
