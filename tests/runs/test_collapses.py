"""Runs that come to nothing by one setting: each is told with the step, a number, and the setting to change."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from small_runs import model_recipe, save_toy, toy_recipe

import spdcli
from spdcli.errors import NotFinite

LONG = ("decompose.steps=120", "decompose.log_every=10", "decompose.checkpoint_every=1000")
PROMPTS = [f"golf of the sport {number}" for number in range(20)]
TOYS = {
    "gates that begin low": (["importance.gate_bias=-5"], "born_off", 1, "raise importance.gate_bias"),
    "too high a rate": (["decompose.learning_rate=10"], "rate_too_high", 1, "lower decompose.learning_rate"),
    "slices that are too fast": (["decompose.slice_rate=1000"], "rate_too_high", 1, "lower decompose.learning_rate"),
    "one slice": (["slices.C=1"], "few_slices", 0, "raise slices.C"),
    "minimality alone": ([*LONG, "losses.minimality=1000"], "nothing_on", 120, "lower losses.minimality"),
    "it falls apart": ([*LONG, "decompose.learning_rate=0.3"], "unfaithful", 110, "lower decompose.learning_rate"),
}
MODELS = {
    "gates that begin off": (["importance.gate_bias=-5"], "nothing_on", 1, "raise importance.gate_bias"),
    "too high a rate": (["decompose.learning_rate=10"], "rate_too_high", 1, "lower decompose.learning_rate"),
    "twenty prompts": ([f"data.prompts={json.dumps(PROMPTS)}"], "small_batch", 0, "raise decompose.batch"),
}


def told(recipe, folder, kind):
    """The alarm of that kind in the log of a run; a loss that is not finite may end it."""
    with suppress(NotFinite):
        spdcli.decompose(recipe, folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    alarms = {alarm["kind"]: alarm for record in records for alarm in record.get("warnings", [])}
    assert kind in alarms, list(alarms)
    return alarms[kind]


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_that_comes_to_nothing_is_told(name, tmp_path):
    settings, kind, step, setting = TOYS[name]
    toy = save_toy(tmp_path / "trained", toy_recipe(folder=tmp_path))
    alarm = told(toy_recipe(f"target.path={toy}", *settings, folder=tmp_path), tmp_path / "run", kind)
    assert alarm["step"] == step
    assert alarm["setting"].startswith(setting)
    assert any(character.isdigit() for character in alarm["text"])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_comes_to_nothing_is_told(name, tmp_path, tiny_gpt2_dir):
    settings, kind, step, setting = MODELS[name]
    alarm = told(model_recipe(tiny_gpt2_dir, *settings, folder=tmp_path), tmp_path / "run", kind)
    assert alarm["step"] == step
    assert alarm["setting"].startswith(setting)
    assert any(character.isdigit() for character in alarm["text"])
