"""Recipes and targets so small that a whole run takes a moment, and two ways to run `spd` on them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spdcli import cli
from spdcli.files import save_tensors
from spdcli.recipe.reading import load_recipe
from spdcli.recipe.schema import Recipe
from spdcli.runs.directory import TOY_WEIGHTS
from spdcli.runs.subject import toy_shape
from spdcli.targets.induction import InductionToy

ROOT = Path(__file__).parent.parent

TOY = """\
name = "small"
seed = 3
device = "cpu"

[target]
kind = "induction"
d_model = 8
vocabulary = 6
length = 8

[train]
batch = 8
steps = 4
log_every = 2

[slices]
C = 5
init = "svd"

[importance]
kind = "attention"
gate_width = 4

[losses]
stochastic_recon = 1
stochastic_recon_partial = 1
recon_layerwise = 0.5
faithfulness = 10
minimality = 0.2
last_token_only = true

[decompose]
batch = 4
steps = 8
learning_rate = 0.01
schedule = "cosine"
log_every = 1
checkpoint_every = 2
"""

MODEL = """\
name = "small"
device = "cpu"

[target]
kind = "huggingface"
model = "MODEL"

[data]
prompts = [
  "Kobe Bryant plays professional basketball",
  "Tiger Woods plays the sport of golf",
]

[slices]
C = 6
matrices = ["*.1.*"]

[importance]
kind = "vector"
gate_width = 3

[losses]
stochastic_recon = 1
minimality = 0.1

[decompose]
batch = 2
steps = 2
"""

Answer = tuple[int, str, str]
Spd = Callable[..., Answer]


def toy_recipe(*settings: str, folder: Path) -> Recipe:
    """The recipe TOY with `settings` as `--set` takes them."""
    path = folder / "toy.toml"
    path.write_text(TOY)
    return load_recipe(path, settings).recipe


def model_recipe(model: Path, *settings: str, folder: Path) -> Recipe:
    """The recipe MODEL for the language model in the directory `model`."""
    path = folder / "model.toml"
    path.write_text(MODEL)
    return load_recipe(path, [f"target.model={model}", *settings]).recipe


def loud_toy(recipe: Recipe, seed: int = 0) -> InductionToy:
    """An untrained toy with weights so large that its attention and its predictions have opinions."""
    torch.manual_seed(seed)
    toy = InductionToy(toy_shape(recipe.target))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.normal_(std=1.0)
    return toy.eval()


def save_toy(folder: Path, recipe: Recipe, seed: int = 0) -> Path:
    """A toy where `target.path` expects it, without the time that training takes."""
    save_tensors(folder / TOY_WEIGHTS, loud_toy(recipe, seed).state_dict())
    return folder


def spd_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Spd:
    """Runs `spd` in this process; gives its exit code, stdout and stderr."""

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["spd", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return exit_.value.code, out, err  # type: ignore[return-value]

    return run


def spd_process(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Starts `spd` in a process of its own; an empty value takes a variable out of its environment."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "spdcli", *map(str, arguments)],
        env={name: value for name, value in variables.items() if value},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def one_line(err: str, *said: str) -> None:
    """`err` is one error and at most one hint, and says all of `said`."""
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] in (["error"], ["error", "hint"]), err
    for text in said:
        assert text in err, err
