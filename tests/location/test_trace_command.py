"""`spd trace`: models and runs, subjects, what it prints, the figures that it draws."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread
from small_runs import MODEL, TOY, one_line, save_toy, spd_here, toy_recipe

from spdcli.location.tracing import TraceSettings, trace
from spdcli.records import plain
from spdcli.targets.huggingface import build_target, load_model

KOBE, TIGER = "Kobe Bryant plays professional basketball", "Tiger Woods plays the sport of golf"
BOTH = ["--subject", "Kobe Bryant", "--subject", "Tiger Woods"]
FEW = ["--samples", 2, "--window", 1]


@pytest.fixture
def spd(monkeypatch, capsys):
    return spd_here(monkeypatch, capsys)


def answer(spd, *arguments):
    code, out, err = spd("trace", *arguments, "--json")
    assert code == 0, err
    return json.loads(out), err


@pytest.fixture
def run(spd, tmp_path, tiny_gpt2_dir):
    recipe = tmp_path / "model.toml"
    recipe.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)) + "\n")
    code, _, err = spd("decompose", recipe, "--out", tmp_path / "run", "--set", "seed=7")
    assert code == 0, err
    return tmp_path / "run"


def test_a_model_is_traced_as_the_analysis_does(spd, tmp_path, tiny_llama_dir):
    data, err = answer(spd, tiny_llama_dir, "--prompt", KOBE, *BOTH[:2], *FEW, "--seed", 3, "--out", tmp_path / "f")
    assert (data["schema"], data["layers"], data["seed"]) == ("spd.trace/1", 3, 3)
    [entry] = data["prompts"]
    assert (err == "") == (entry["corrupted"] <= entry["clean"])
    assert err == "" or f"noise raises P(' basketball') from {entry['clean']:.4f}" in err
    language_model = load_model(str(tiny_llama_dir), "float32")
    target, settings = build_target(language_model, False), TraceSettings(samples=2, window=1, seed=3)
    [wanted] = plain(trace(target, language_model.tokenizer, [KOBE], ["Kobe Bryant"], settings))
    for key in ("clean", "corrupted", "sites", "best", "sigma"):
        assert entry[key] == wanted[key]
    assert (entry["prompt"], entry["answer"], entry["subject"]) == (KOBE, " basketball", [0, 1, 2])
    assert entry["tokens"] == ["K", "obe", " Bryant", " plays", " professional"]
    assert data["figures"] == [str(tmp_path / "f" / name) for name in ("trace.png", "trace.svg")]


def test_a_run_knows_its_prompts_and_its_seed(spd, run):
    data, _ = answer(spd, run, *BOTH, *FEW)
    assert [entry["prompt"] for entry in data["prompts"]] == [KOBE, TIGER]
    assert [len(entry["sites"]["mlp"]["effect"]) for entry in data["prompts"]] == [5, 7]
    assert data["seed"] == 7
    names = [f"trace-{number}.{kind}" for number in (1, 2) for kind in ("png", "svg")]
    assert data["figures"] == [str(run / "figures" / name) for name in names]
    pixels = imread(data["figures"][0])[..., :3]
    assert abs(pixels - pixels.mean(-1, keepdims=True)).max() < 0.01  # readable without colour
    assert len(ElementTree.parse(data["figures"][1]).getroot().findall(".//{*}path")) > 10


def test_what_people_read(spd, run):
    code, out, err = spd("trace", run, *BOTH, *FEW)
    assert code == 0, err
    for said in (KOBE, TIGER, "hidden state", "MLPs", "attention", "the subject", "' Woods'", "windows of 1 of 3"):
        assert said in out
    assert out.splitlines()[-1] == str(run / "figures" / "trace-2.png")
    code, out, err = spd("trace", run, *BOTH, *FEW, "-q")
    assert (code, err) == (0, "")
    assert out.splitlines() == [str(run / "figures" / f"trace-{number}.png") for number in (1, 2)]


def test_a_wide_window_is_told(spd, run):
    code, _, err = spd("trace", run, *BOTH, "--samples", 1, "-q")
    assert code == 0
    assert err.startswith("warning: a window of 10 blocks of 3")


def test_the_facts_name_subjects(spd, run):
    data, _ = answer(spd, run, *FEW)
    assert [entry["subject"] for entry in data["prompts"]] == [[0, 1, 2], [0, 1, 2]]
    data, _ = answer(spd, run, "--subject", "Bryant", *FEW)
    assert [entry["subject"] for entry in data["prompts"]] == [[2], [0, 1, 2]]


def test_what_is_missing_is_asked_for(spd, run, tmp_path, tiny_gpt2_dir):
    for arguments, said in (
        ([run, "--prompt", "the sport of golf"], "which words of 'the sport of golf' are its subject?"),
        ([run, "--subject", "Koby"], "no prompt has the subject 'Koby'"),
        ([tiny_gpt2_dir, "--subject", "Kobe"], "--prompt TEXT"),
        ([tiny_gpt2_dir, "--prompt", "2"], "is a model, which has no prompts of its own"),
        ([run, "--prompt", "3"], "prompt 3: expected one of the run's prompts, 1 to 2"),
    ):
        code, out, err = spd("trace", *arguments, *FEW)
        assert (code, out) == (2, "")
        one_line(err, said)
    code, _, err = spd("trace", tmp_path / "nowhere" / "x", "--prompt", KOBE, "--subject", "Kobe")
    assert code == 2
    one_line(err, "there is no model at")
    trained = save_toy(tmp_path / "trained", toy_recipe(folder=tmp_path))
    recipe = tmp_path / "toy.toml"
    recipe.write_text(TOY.replace('"induction"', f'"induction"\npath = "{trained}"'))
    assert spd("decompose", recipe, "--out", tmp_path / "toy")[0] == 0
    code, _, err = spd("trace", tmp_path / "toy", "--subject", "s")
    assert code == 2
    one_line(err, "needs a language model")
