"""Runs of a small toy and of a tiny GPT-2, in memory."""

from __future__ import annotations

import pytest
from small_runs import model_recipe, save_toy, toy_recipe

import spdcli


@pytest.fixture(scope="package")
def toy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toy = save_toy(folder / "trained", toy_recipe(folder=folder))
    return spdcli.decompose(toy_recipe(f"target.path={toy}", folder=folder))


@pytest.fixture(scope="package")
def language_run(tmp_path_factory, tiny_gpt2_dir):
    return spdcli.decompose(model_recipe(tiny_gpt2_dir, "slices.delta=true", folder=tmp_path_factory.mktemp("model")))
