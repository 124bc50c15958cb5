"""Recipes without room: refused at once, by one line, before anything is drawn, read or trained."""

from __future__ import annotations

import pytest
import torch
from small_runs import ROOT, model_recipe, one_line, spd_here

from spdcli.costs import room
from spdcli.costs.estimate import counted
from spdcli.costs.room import least_needs, refuse_without_room
from spdcli.errors import SpdError
from spdcli.recipe.reading import load_recipe, shipped
from spdcli.recipe.schema import ToyTarget

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def spd(monkeypatch, capsys):
    return spd_here(monkeypatch, capsys)


@pytest.fixture
def eight_gib(monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: 8 * GIB)


ABSURD = {
    "slices.C=1000000": ("1,000,000 slices of a matrix and their gates needs", "slices.C"),
    "target.length=1000000": ("a step of the toy's training on 256 sequences needs", "target.length"),
    "decompose.batch=1000000": ("a step on 1,000,000 sequences needs", "decompose.batch"),
    "train.batch=1000000": ("a step of the toy's training on 1,000,000 sequences needs", "train.batch"),
    "target.d_model=1000000": ("the toy's parameters and their training needs", "target.d_model"),
}


@pytest.mark.parametrize("command", ["plan", "decompose"])
@pytest.mark.parametrize("setting", ABSURD)
def test_absurd_sizes_are_refused_before_anything_is_made(spd, tmp_path, eight_gib, command, setting):
    part, key = ABSURD[setting]
    out = () if command == "plan" else ("--out", tmp_path / "run")
    code, printed, err = spd(command, "induction-quick", "--set", setting, *out)
    assert (code, printed) == (1, "")
    one_line(err, f"induction-quick does not fit: {part}", "at least, and 8.00 GiB are free", "hint: --set a smaller")
    assert key in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["plan"], ["decompose"], ["train"], ["recipe", "check"]], ids=" ".join)
@pytest.mark.parametrize("setting", ["slices.C=1000000000", "losses.samples=1000000000", f"target.layers={2**63 - 1}"])
def test_numbers_beyond_the_schema_are_a_mistake_of_the_recipe(spd, tmp_path, monkeypatch, command, setting):
    monkeypatch.chdir(tmp_path)
    code, _, err = spd(*command, "induction-quick", "--set", setting)
    assert code == 2
    one_line(err, "and at most 1,000")
    assert not list(tmp_path.iterdir())


def test_the_toys_own_training_is_looked_at_too(spd, tmp_path, eight_gib):
    code, _, err = spd("train", "induction-quick", "--set", "train.batch=1000000", "--out", tmp_path / "toy")
    assert code == 1
    one_line(err, "a step of the toy's training on 1,000,000 sequences needs")


@pytest.mark.parametrize("name", shipped())
def test_the_smallest_needs_are_below_the_estimate(name):
    loaded = load_recipe(name)
    if not isinstance(loaded.recipe.target, ToyTarget):
        assert not list(least_needs(loaded.recipe))
        return
    (step,) = [need.bytes for need in least_needs(loaded.recipe) if need.part.startswith("a step on")]
    assert max(need.bytes for need in least_needs(loaded.recipe)) < 4 * GIB
    if name.endswith("quick"):
        need = counted(loaded, CPU).need
        assert step < need.total - need.process + 2**21  # so much is free in the process itself


@pytest.mark.parametrize("command", ["plan", "decompose"])
def test_prompts_that_a_dual_start_cannot_hold_are_told_before_the_model_is_read(
    spd, tiny_gpt2_dir, tmp_path, monkeypatch, command
):
    """No two positions of the two prompts come after the same tokens."""
    recipe = tmp_path / "model.toml"
    model_recipe(tiny_gpt2_dir, folder=tmp_path)
    settings = ["--set", f"target.model={tiny_gpt2_dir}", "--set", "slices.init=dual"]
    counts = counted(load_recipe(recipe, [f"target.model={tiny_gpt2_dir}"]), CPU)
    inputs = counts.step.tokens
    monkeypatch.setattr("spdcli.targets.huggingface.load_model", lambda *_: pytest.fail("the weights were read"))
    monkeypatch.chdir(tmp_path)
    code, printed, err = spd(command, recipe, *settings, "--set", f"slices.C={inputs - 1}")
    assert (code, printed) == (1, "")
    one_line(err, f"a dual start needs a slice for each of the data's {inputs} distinct inputs; there is room for")
    assert spd("plan", recipe, *settings, "--set", f"slices.C={inputs}")[0] == 0


def test_what_reason_allows_is_counted(tmp_path, monkeypatch):
    loaded = load_recipe(ROOT / "recipes" / "induction-quick.toml")
    refuse_without_room(loaded, CPU)
    monkeypatch.setattr(room, "free_bytes", lambda device: 2**27)
    monkeypatch.setattr("spdcli.costs.estimate.free_bytes", lambda device: -(2**28))
    with pytest.raises(SpdError, match=r"induction-quick does not fit: it needs .*, and .* are free") as refused:
        refuse_without_room(loaded, CPU)
    assert "slices.C" in refused.value.hint
