"""Settings that change nothing are mistakes: every row of the table once met and once not."""

from __future__ import annotations

import pytest

from spdcli.errors import RecipeError
from spdcli.recipe.idle import NEEDS
from spdcli.recipe.reading import dump_recipe, load_recipe, shipped

OTHER = {  # a value that is not the usual one, and what meets its need
    "importance.relative": ("scalar", ["importance.kind=attention"]),
    "importance.relative_start": ("local", ["importance.kind=attention", "importance.relative=scalar"]),
    "importance.backend": ("dense", ["importance.kind=attention"]),
    "importance.causal": (True, ["importance.kind=global"]),
    "importance.layers": (3, ["importance.kind=global"]),
    "importance.width": (32, ["importance.kind=global"]),
    "importance.heads": (2, ["importance.kind=global"]),
    "importance.start": ("inner", ["importance.kind=scalar"]),
    "importance.gate_bias": (0.9, ["importance.start=random"]),
    "importance.gate_spread": (0.1, ["importance.start=random"]),
    "slices.distinct": (0.2, ["slices.init=dual"]),
    "slices.fill": (0.8, ["slices.init=dual"]),
    "slices.ridge": (0.5, ["slices.init=dual_whitened", "data.stream=generated"]),
    "losses.samples": (2, ["losses.stochastic_recon=1"]),
    "losses.subset": ("position", ["losses.recon_partial=1"]),
    "losses.hidden_at": ("block", ["losses.hidden_recon=1"]),
    "losses.hidden_scale": ("sequence", ["losses.hidden_recon=1"]),
    "losses.penalty": ("smooth_l0", ["losses.frequency=1"]),
    "losses.penalty_final": (0.1, ["losses.frequency=1"]),
    "losses.p_start": (0.8, ["losses.minimality=1"]),
    "losses.anneal_p": (False, ["losses.minimality=1"]),
    "losses.epsilon": (1e-6, ["losses.minimality=1"]),
    "losses.p_final": (0.2, ["losses.minimality=1"]),
    "losses.gamma_start": (0.9, ["losses.minimality=1", "losses.penalty=smooth_l0"]),
    "losses.gamma_final": (0.02, ["losses.minimality=1", "losses.penalty=smooth_l0"]),
    "losses.frequency_tokens": (64, ["losses.frequency=1"]),
    "data.stream_sequences": (8, ["data.stream=generated", "losses.targeted=1", "slices.delta=true"]),
    "data.stream_length": (8, ["data.stream=generated", "losses.targeted=1", "slices.delta=true"]),
    "decompose.stream_batch": (2, ["data.stream=generated", "losses.targeted=1", "slices.delta=true"]),
    "decompose.prune_below": (0.5, ["decompose.prune_at=0.5"]),
}
IDLE = {  # what makes a setting idle that a plain recipe reads
    "importance.relative_start": ["importance.relative=scalar"],
    "importance.gate_bias": ["importance.kind=scalar", "importance.start=inner"],
    "importance.gate_spread": ["importance.kind=scalar", "importance.start=inner"],
}
PLAIN = """
name = "plain"
[target]
kind = "huggingface"
model = "nowhere"
[data]
prompts = ["one two"]
[slices]
C = 2
[importance]
kind = "vector"
gate_width = 2
[losses]
recon = 1
[decompose]
batch = 1
steps = 1
"""


@pytest.mark.parametrize("setting", [setting for need in NEEDS for setting in need.settings])
def test_a_setting_that_nothing_reads(setting, tmp_path):
    path = tmp_path / "plain.toml"
    path.write_text(PLAIN)
    value, meets = OTHER[setting]
    section, _, key = setting.partition(".")
    option = f"{setting}={str(value).lower() if isinstance(value, bool) else value}"
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [option, *IDLE.get(setting, [])])
    assert f"--set {option}: [{section}] {key} = " in caught.value.message
    assert "changes nothing: it needs " in caught.value.message
    load_recipe(path, [option, *meets])


@pytest.mark.parametrize("name", shipped())
def test_what_a_run_writes_can_be_read_again(name, tmp_path):
    loaded = load_recipe(name)
    path = tmp_path / "recipe.toml"
    path.write_text(dump_recipe(loaded.recipe))  # every usual value is in it
    assert load_recipe(path).recipe == loaded.recipe


def test_the_line_of_a_setting_that_nothing_reads_is_named(tmp_path):
    path = tmp_path / "plain.toml"
    path.write_text(PLAIN.replace('prompts = ["one two"]', 'prompts = ["one two"]\nstream_length = 5'))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.message == f"{path}:8: [data] stream_length = 5 changes nothing: it needs data.stream"


def test_what_an_option_made_idle_is_dropped():
    """A shipped recipe with another importance function is no mistake, and what the run writes can be read again."""
    recipe = load_recipe("induction-quick", ["importance.kind=vector"]).recipe
    assert (recipe.importance.relative, recipe.importance.relative_start) == ("query", "zero")
    with pytest.raises(RecipeError):
        load_recipe("induction-quick", ["importance.kind=vector", "importance.backend=dense"])


def test_the_recipe_of_an_older_run_is_read(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(PLAIN.replace('kind = "vector"', 'kind = "vector"\nrelative = "scalar"'))
    with pytest.raises(RecipeError):
        load_recipe(path)
    assert load_recipe(path, written_by_a_run=True).recipe.importance.relative == "query"
