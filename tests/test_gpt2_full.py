"""`recipes/gpt2.toml` as it is, on a GPT-2 of the real size with random weights: one step of its 20000."""

from __future__ import annotations

import json
import math
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import save_tokenizer
from small_runs import ROOT, one_line, spd_here, spd_process

from spdcli.engine.losses import RECONSTRUCTION
from spdcli.recipe_file import load_recipe
from spdcli.runs import DECOMPOSITION, RunDirectory, load_tensors

pytestmark = pytest.mark.slow
GIB = 2**30
RECIPE = ROOT / "recipes/gpt2.toml"
WIDTHS = {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768), "mlp.c_fc": (768, 3072), "mlp.c_proj": (3072, 768)}
MATRICES = {f"h.{block}.{name}": widths for block in range(12) for name, widths in WIDTHS.items()}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Iterator[Path]:
    """GPT-2 small: 12 blocks, width 768, 12 heads, 50257 tokens, of which the tokenizer uses the first few hundred."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    save_tokenizer(folder)
    config = GPT2Config()
    assert (config.n_layer, config.n_embd, config.n_head, config.vocab_size) == (12, 768, 12, 50257)
    GPT2LMHeadModel(config).save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def run(gpt2, tmp_path_factory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("full") / "run"
    settings = (f"target.model={gpt2}", "importance.basis=span", "decompose.steps=1")
    process = spd_process("decompose", RECIPE, "--out", out, "-q", *(x for s in settings for x in ("--set", s)))
    assert (*process.communicate(), process.returncode) == (f"{out}\n", "", 0)
    yield out
    shutil.rmtree(out)  # 2 GiB, which pytest would keep


def test_one_step_of_every_loss_on_every_matrix(run):
    (record,) = RunDirectory(run).metrics()
    losses = load_recipe(RECIPE).recipe.losses
    terms = ["faithfulness", "minimality", *RECONSTRUCTION]
    wanted = {name for name in terms if getattr(losses, name) > 0}
    assert record["losses"].keys() == wanted
    assert len(wanted) == 7
    values = [*record["losses"].values(), *record["gradients"].values(), record["total"]]
    assert all(value is not None and math.isfinite(value) and value > 0 for value in values)
    assert list(record["active"]) == list(MATRICES)
    assert all(0 < active <= 768 for active in record["active"].values())
    # Gates begin around gate_bias = 0.5, in each of 48 matrices with 768 slices.
    assert 0.2 < record["losses"]["minimality"] / (48 * 768) < 0.8


def test_all_slices_are_saved(run):
    tensors, _ = load_tensors(run / DECOMPOSITION)
    for name, (d_in, d_out) in MATRICES.items():
        key = name.replace(".", "/")
        assert tensors[f"slices.{key}.U"].shape == (d_in, 768)
        assert tensors[f"slices.{key}.V"].shape == (768, d_out)
        rank = tensors[f"importances.bases.{key}"].shape[0]
        assert rank <= 14  # as many as there are tokens
        assert tensors[f"importances.gates.{key}.w1"].shape == (rank, 768 * 64)


def test_it_fits_a_laptop(run):
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert 2 * GIB < peak < 12 * GIB


def test_a_token_can_be_looked_at(run, monkeypatch, capsys):
    options = ("--token", "Bryant", "--matrix", "h.3.*", "--top", 2, "--json")
    code, printed, err = spd_here(monkeypatch, capsys)("inspect", run, *options)
    assert (code, err) == (0, "")
    (occurrence,) = json.loads(printed)["occurrences"]
    assert occurrence["text"] == "Kobe Bryant plays the sport of basketball"
    assert [entry["slice"].rsplit(":", 1)[0] in MATRICES for entry in occurrence["slices"]] == [True, True]


def test_without_the_span_basis_it_says_what_is_needed(gpt2, tmp_path, monkeypatch, capsys):
    """The paper's gates read whole inputs: some 3 billion parameters."""
    monkeypatch.setattr("spdcli.costs.machine.free_bytes", lambda device: 20 * GIB)
    slices = sum(768 * (d_in + d_out) for d_in, d_out in MATRICES.values())
    gates = sum(768 * (d_in * 64 + 64 + 64 + 1) for d_in, _ in MATRICES.values())
    began = time.monotonic()
    code, printed, err = spd_here(monkeypatch, capsys)(
        "decompose", RECIPE, "--out", tmp_path / "run", "--set", f"target.model={gpt2}"
    )
    assert time.monotonic() - began < 20
    assert (code, printed) == (1, "")
    needed = f"{slices / 1e6:.0f} million slice and {gates / 1e6:.0f} million gate parameters need "
    one_line(
        err, f"{needed}{16 * (slices + gates) / GIB:.0f} GiB", "20 GiB are free", "hint: --set importance.basis=span"
    )
