"""A folder in which the commands of the documents run as printed, in a moment: the shipped recipes made small.

A recipe keeps its name, its file and all that it says, but for sizes and steps; a language model is a random one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from spdcli.recipe import reading

TOY = (
    "target.length=8",
    "target.vocabulary=20",
    "train.steps=40",
    "train.batch=16",
    "slices.C=6",
    "importance.gate_width=4",
    "decompose.steps=6",
    "decompose.batch=8",
    "decompose.log_every=2",
)
FACTS = (
    "data.stream_sequences=8",
    "data.stream_length=8",
    "losses.minimality=0.005",  # so that some slices are on in one prompt alone, as in the real model
    "decompose.steps=60",
    "decompose.learning_rate=0.02",
)
TEXT = (
    "slices.C=6",
    "data.stream_length=32",
    "data.stream_sequences=40",
    "decompose.steps=4",
    "decompose.batch=4",
)
SMALL = {"induction-quick": TOY, "smollm2-facts": FACTS, "smollm2-text": TEXT}


def make_small_world(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes the small recipes into `folder`/recipes, makes them the shipped ones, and goes to `folder`.

    `model` is the directory of the language model that stands in for SmolLM2-135M.
    """
    recipes = folder / "recipes"
    recipes.mkdir(exist_ok=True)
    for name, settings in SMALL.items():
        stand_in = [] if name == "induction-quick" else [f"target.model={model}"]
        recipe = reading.load_recipe(name, [*settings, *stand_in]).recipe
        (recipes / f"{name}.toml").write_text(reading.dump_recipe(recipe))
    monkeypatch.setattr(reading, "shipped", lambda: {path.stem: path for path in sorted(recipes.glob("*.toml"))})
    monkeypatch.chdir(folder)
