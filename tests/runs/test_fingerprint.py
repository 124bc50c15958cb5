"""A run keeps the hashes of its target's weights, and whoever reads it compares them."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import MODEL, one_line, spd_here
from torch import nn

from spdcli.disk import write_json
from spdcli.errors import SpdError
from spdcli.runs.fingerprint import FINGERPRINT, weight_hashes
from spdcli.runs.loading import load

FC = "transformer.h.0.mlp.c_fc.weight"


def test_a_hash_stands_for_type_shape_and_every_bit():
    module = nn.Linear(3, 4)
    before = weight_hashes(module)
    assert before.keys() == {"weight", "bias"}
    assert weight_hashes(module) == before
    bits = module.weight.detach().view(torch.int32)
    bits[1, 2] ^= 1
    after = weight_hashes(module)
    assert (after["weight"] != before["weight"], after["bias"] == before["bias"]) == (True, True)
    bits[1, 2] ^= 1
    assert weight_hashes(module) == before
    assert weight_hashes(module.bfloat16())["bias"] != before["bias"]


@pytest.fixture
def run(tmp_path, tiny_gpt2_dir, monkeypatch, capsys):
    """A run whose model's weights were replaced by others of the same shapes, and a copy of `spd`."""
    spd = spd_here(monkeypatch, capsys)
    model = shutil.copytree(tiny_gpt2_dir, tmp_path / "model")
    (tmp_path / "lm.toml").write_text(MODEL)
    chosen = ("--set", f"target.model={model}")
    assert spd("decompose", tmp_path / "lm.toml", *chosen, "--out", tmp_path / "run", "-q")[0] == 0
    load(tmp_path / "run")
    weights = load_file(model / "model.safetensors")
    weights[FC][0, 0] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return tmp_path / "run", spd


def test_replaced_weights_are_told_by_every_command(run):
    run, spd = run
    other = f"{run}: its target has other weights than when it was decomposed: {FC}"
    for command in (
        ["inspect", run],
        ["decompose", run / "recipe.toml", "--out", run, "--resume"],
        ["trace", run, "--subject", "Kobe Bryant"],
        ["facts", "check", run],
    ):
        code, _, err = spd(*command)
        assert code == 1
        one_line(err, other, "put the model back")
    with pytest.raises(SpdError, match="other weights"):
        load(run)
    (run / FINGERPRINT).unlink()  # as in a run of before they were kept
    load(run)
    write_json(run / FINGERPRINT, {"weights": [1]})
    with pytest.raises(SpdError, match=r"target\.json: holds no weights"):
        load(run)
