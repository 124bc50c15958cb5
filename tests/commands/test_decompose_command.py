"""`spd decompose`: the run that it leaves, what it refuses, and the toy of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from command_runs import bits, line_of, steps
from small_runs import ROOT, TOY, one_line, spd_process

from spdcli.runs.directory import RunDirectory

GIB = 2**30


def test_decompose_trains_its_toy_first(spd, tmp_path):
    (tmp_path / "toy.toml").write_text(TOY)
    out = tmp_path / "run"
    code, printed, err = spd("decompose", tmp_path / "toy.toml", "-o", out)
    assert code == 0
    assert printed.splitlines()[-1] == str(out)
    assert printed.startswith("total loss ")
    assert f"toy trained into {out / 'toy'}" in err
    assert steps(out) == list(range(1, 9))
    assert steps(out / "toy") == [1, 2, 4]
    assert {file.name for file in out.iterdir()} == {
        "recipe.toml", "metrics.jsonl", "decomposition.safetensors", "checkpoint", "toy", "target.json",
    }  # fmt: skip
    last = RunDirectory(out).metrics()[-1]
    assert last["losses"].keys() == {
        "stochastic_recon", "stochastic_recon_partial", "recon_layerwise", "faithfulness", "minimality",
    }  # fmt: skip
    assert last["active"].keys() == {"Q0", "K0", "V0", "Q1", "K1", "V1"}
    assert last["gradients"].keys() == {"slices", "gates"}
    weights = {"stochastic_recon": 1, "stochastic_recon_partial": 1, "recon_layerwise": 0.5, "faithfulness": 10}
    total = sum(weight * last["losses"][name] for name, weight in weights.items()) + 0.2 * last["losses"]["minimality"]
    assert last["total"] == pytest.approx(total)


def test_json_is_one_object_and_quiet_is_one_path(spd, recipe, tmp_path):
    code, printed, err = spd("decompose", recipe, "--out", tmp_path / "a", "--json")
    assert (code, err) == (0, "")
    data = json.loads(printed)
    assert (data["schema"], data["run"], data["step"]) == ("spd.decompose/1", str(tmp_path / "a"), 8)
    assert spd("decompose", recipe, "--out", tmp_path / "b", "-q") == (0, f"{tmp_path / 'b'}\n", "")


def test_the_path_of_a_run_can_be_handed_on(recipe, tmp_path):
    script = f'spd() {{ "{sys.executable}" -m spdcli "$@"; }}; spd inspect "$(spd decompose "$1" --out "$2" -q)" -t s'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-ec", script, "bash", str(recipe), str(tmp_path / "a run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("'s' at position") == 8
    assert done.stderr == ""


def test_a_run_is_not_overwritten_unless_forced(spd, recipe, tmp_path):
    out = tmp_path / "run"
    assert spd("decompose", recipe, "--out", out)[0] == 0
    before = bits(out)
    code, _, err = spd("decompose", recipe, "--out", out, "--seed", 8)
    assert code == 2
    one_line(err, f"{out} holds another run", "--force", "--resume")
    assert bits(out) == before
    code, _, err = spd("decompose", recipe, "--out", out, "--force", "--resume")
    assert code == 2
    one_line(err, "--resume and --force contradict each other")
    assert spd("decompose", recipe, "--out", out, "--seed", 8, "--force")[0] == 0
    assert bits(out) != before
    assert spd("decompose", recipe, "--out", out, "--force")[0] == 0
    assert bits(out) == before  # the same recipe and seed: the same run


def test_a_directory_of_something_else_is_never_touched(spd, recipe, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("mine")
    for options in ([], ["--force"], ["--resume"]):
        code, _, err = spd("decompose", recipe, "--out", out, *options)
        assert code == 2
        assert "is not empty and holds no run" in err
    assert [file.name for file in out.iterdir()] == ["chapter.tex"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("V7", "the nearest are V1, V0"), ("blocks.*", "it has Q0, K0, V0 ...")],
)
def test_a_pattern_that_matches_nothing_is_blamed_on_its_line(spd, recipe, tmp_path, pattern, said):
    recipe.write_text(recipe.read_text().replace("[slices]", f'[slices]\nmatrices = [\n  "Q0",\n  "{pattern}",\n]'))
    code, _, err = spd("decompose", recipe, "--out", tmp_path / "run")
    assert code == 2
    line = line_of(recipe, f'  "{pattern}"')
    one_line(err, f"{recipe}:{line}: [slices] matrices: '{pattern}' matches no matrix of the target; {said}")


def test_a_refused_run_does_not_stand_in_the_way_of_the_next(spd, recipe, tmp_path):
    out = tmp_path / "run"
    assert spd("decompose", recipe, "--out", out, "--set", "target.path=nowhere")[0] == 2
    assert spd("decompose", recipe, "--out", out)[0] == 0


def test_too_large_a_decomposition_is_refused_before_it_is_made(spd, recipe, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("spdcli.runs.learning.start_decomposition", lambda *_: made.append(1))
    monkeypatch.setattr("spdcli.costs.room.free_bytes", lambda device: 2**60)
    monkeypatch.setattr("spdcli.runs.learning.free_bytes", lambda device: 3 * GIB)
    code, _, err = spd("decompose", recipe, "--out", tmp_path / "run", "--set", "slices.C=1000000")
    assert (code, made) == (1, [])
    slices = 6 * 1_000_000 * 16  # six matrices, 8 + 8 numbers a slice
    gates = 6 * 1_000_000 * (4 * 16 + 4 + 4 + 1)  # each gate reads 16 numbers: w1, b1, w2, b2
    needed = round(4 * 4 * (slices + gates) / GIB)
    one_line(
        err, f"{slices // 10**6} million slice and {gates // 10**6} million gate", f"{needed} GiB", "3 GiB are free"
    )
    assert "importance.basis" not in err  # which is for vector gates


def test_a_trained_toy_is_copied_and_not_trained_again(spd, recipe, tmp_path):
    """From `spd train`, or from another run's toy; the run keeps a copy and does not need the original."""
    assert spd("decompose", recipe, "--out", tmp_path / "a")[0] == 0
    assert spd("decompose", recipe, "--out", tmp_path / "b", "--set", f"target.path={tmp_path / 'a'}")[0] == 0
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    (tmp_path / "trained" / "target.safetensors").unlink()
    for run in "ab":
        assert [file.name for file in (tmp_path / run / "toy").iterdir()] == ["target.safetensors"]
        assert spd("inspect", tmp_path / run, "-t", "s")[0] == 0


def test_a_path_without_a_toy_is_blamed_on_its_line(spd, recipe, tmp_path):
    (tmp_path / "trained" / "target.safetensors").unlink()
    code, _, err = spd("decompose", recipe, "--out", tmp_path / "run")
    assert code == 2
    one_line(err, f"{recipe}:{line_of(recipe, 'path')}: [target] path: {tmp_path / 'trained'} holds no toy")


def test_a_toy_of_another_shape_is_refused(spd, recipe, tmp_path):
    code, _, err = spd("decompose", recipe, "--out", tmp_path / "run", "--set", "target.vocabulary=9")
    assert code == 1
    one_line(err, "trained/target.safetensors: 'embed.weight' has the shape [7, 8], not [10, 8]")


def test_an_unreachable_hub_is_one_line_and_soon(tmp_path):
    began = time.monotonic()
    process = spd_process(
        *("decompose", ROOT / "recipes/gpt2.toml", "--out", tmp_path / "run"),
        HF_HUB_OFFLINE="",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path / "empty"),
    )
    printed, err = process.communicate()
    assert (process.returncode, printed) == (1, "")
    one_line(err, "the hub cannot be reached for 'openai-community/gpt2'", "a local directory", "a .gguf file")
    assert time.monotonic() - began < 30  # HUB_SECONDS, and two large imports on a machine that may be busy
