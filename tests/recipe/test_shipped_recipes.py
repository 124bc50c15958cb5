"""The shipped recipes: the paper's tables to the letter, each value with its source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from spdcli.recipe.losses import Losses
from spdcli.recipe.reading import dump_recipe, load_recipe, shipped
from spdcli.recipe.rules import HOLDING

PAPER = {
    ("induction", "train"): {  # Table 3
        "batch": 1024,
        "optimizer": "adamw",
        "learning_rate": 0.001,
        "weight_decay": 0.01,
        "schedule": "constant",
        "warmup": 1000,
        "steps": 100000,
    },
    ("induction", "target"): {  # section 5.1 and Table 3
        "layers": 2,
        "heads": 1,
        "d_model": 16,
        "positions": "after",
        "layer_norm": False,
        "feed_forward": False,
        "vocabulary": 128,
        "length": 64,
    },
    ("induction", "decompose"): {  # Table 4
        "batch": 1024,
        "optimizer": "adam",
        "learning_rate": 0.001,
        "schedule": "cosine",
        "warmup": 0,
        "steps": 100000,
    },
    ("induction", "slices"): {"C": 100},
    ("induction", "importance"): {"gate_width": 16, "kind": "attention"},
    ("induction", "losses"): {  # Table 4, which lists no partial loss and no layerwise recon
        "stochastic_recon": 1,
        "stochastic_recon_layerwise": 1,
        "stochastic_recon_partial": 0,
        "recon": 0.5,
        "recon_layerwise": 0,
        "recon_partial": 0,
        "faithfulness": 1000,
        "minimality": 0.02,
        "p_start": 0.9,
        "p_final": 0.1,
        "anneal_p": True,
        "last_token_only": True,
    },
    ("gpt2", "decompose"): {  # Figure 6
        "batch": 2,
        "optimizer": "adamw",
        "learning_rate": 0.001,
        "weight_decay": 0.05,
        "schedule": "constant",
        "warmup": 0.01,
        "steps": 20000,
    },
    ("gpt2", "slices"): {"C": 768},
    ("gpt2", "importance"): {"gate_width": 64, "kind": "vector"},
    ("gpt2", "losses"): {  # Figure 6
        "stochastic_recon": 0.1,
        "stochastic_recon_partial": 10,
        "stochastic_recon_layerwise": 0.1,
        "recon": 0.1,
        "recon_partial": 10,
        "recon_layerwise": 0,
        "faithfulness": 1000000,
        "minimality": 0.05,
        "p_start": 0.9,
        "p_final": 0.1,
        "anneal_p": True,
        "last_token_only": False,
    },
}


@pytest.mark.parametrize(
    ("name", "section", "key", "value"),
    [(name, section, key, value) for (name, section), keys in PAPER.items() for key, value in keys.items()],
)
def test_the_papers_values_to_the_letter(name: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(load_recipe(name).recipe, section), key) == value


def test_the_papers_sentences() -> None:
    data = load_recipe("gpt2").recipe.data
    assert data is not None
    assert data.prompts == ["Kobe Bryant plays the sport of basketball", "Tiger Woods plays the sport of golf"]


@pytest.mark.parametrize("name", ["induction", "gpt2"])
def test_every_value_of_the_papers_recipes_says_its_source(name: str) -> None:
    lines = shipped()[name].read_text().splitlines()
    values = [line for line in lines if re.match(r"\w+ = ", line) and not line.startswith(("name", "seed", "kind"))]
    assert [line for line in values if "#" not in line and not line.endswith("[")] == []


def test_the_four_recipes_are_shipped() -> None:
    assert set(shipped()) >= {"induction", "induction-quick", "gpt2", "smollm2"}


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name).recipe
    assert recipe.name == name
    copy = tmp_path / "recipe.toml"
    copy.write_text(dump_recipe(recipe, spd="0.1", torch="2\n[x]"))
    assert load_recipe(copy).recipe == recipe
    assert copy.read_text().startswith("# spd: 0.1\n# torch: 2 [x]\n")


def test_every_loss_that_holds_slices_to_the_target_is_known_to_the_rules():
    assert set(HOLDING) == {name for name in Losses.model_fields if name.endswith("faithfulness") or "recon" in name}
