"""What the Tab key offers, asked as a shell asks: through the environment, of a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from small_runs import ROOT

from spdcli.recipe.reading import shipped


@pytest.fixture
def offered(tmp_path):
    run = tmp_path / "runs" / "toy"
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text("name = 'toy'")
    (tmp_path / "own.toml").write_text("")
    save_file(
        {
            "slices.h/0/mlp.U": torch.zeros(2, 12),
            "slices.h/0/mlp.V": torch.zeros(12, 3),
            "slices.Q0.U": torch.zeros(2, 1),
        },
        run / "decomposition.safetensors",
    )

    def ask(line: str) -> list[str]:
        """The candidates for the last word of `line`."""
        shell = {"_SPD_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        done = subprocess.run(
            [sys.executable, "-m", "spdcli"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | shell,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        return done.stdout.split()

    return ask


def test_recipes_and_runs(offered):
    assert offered("spd decompose induction-") == [name for name in shipped() if name.startswith("induction-")]
    assert offered("spd plan ow") == ["own.toml"]
    assert offered("spd eval ru") == ["runs/"]
    assert offered("spd eval runs/") == ["runs/toy"]
    assert offered("spd eval nowhere/") == []


def test_matrices_and_slices_of_the_run_that_is_named(offered):
    assert offered("spd suppress runs/toy --slice h") == ["h.0.mlp:"]
    assert offered("spd suppress --device cpu runs/toy --slice h.0.mlp:1") == ["h.0.mlp:1", "h.0.mlp:10", "h.0.mlp:11"]
    assert offered("spd inspect runs/toy --matrix Q") == ["Q0"]
    assert offered("spd inspect runs --matrix Q") == []
