"""Toys whose parts are known: the published numbers, the verdict by hand, and a small experiment from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import one_line, spd_here

from spdcli.errors import RecipeError
from spdcli.paper.known_parts import EXPERIMENTS, claims
from spdcli.paper.verdict import judge
from spdcli.recipe.reading import load_recipe, shipped


def found(cosine, ratio):
    return {"mean_max_cosine": cosine, "l2_ratio": ratio, "own": 5}


def test_the_published_numbers_of_superposition():
    rows = {claim.name: (claim.paper, str(claim.bound)) for claim in claims(load_recipe("tms-40-10-id"))}
    assert rows == {
        "tms-40-10-id: max cosine, W": (1.0, "≥ 0.999"),
        "tms-40-10-id: L2 ratio, W": (1.031, "0.965 to 1.035"),
        "tms-40-10-id: live slices, W": (40, "40"),
        "tms-40-10-id: live slices, I": (10, "10"),
    }


def test_the_published_numbers_of_residual_mlps():
    rows = {claim.name: claim.paper for claim in claims(load_recipe("resid-mlp-2")) if "live" in claim.name}
    assert rows == {
        "resid-mlp-2: live slices, W_in0": 100,
        "resid-mlp-2: live slices, W_out0": 25,
        "resid-mlp-2: live slices, W_in1": 100,
        "resid-mlp-2: live slices, W_out1": 25,
    }


@pytest.mark.parametrize(
    ("live", "parts", "broken"),
    [
        (5, found(0.9995, 0.97), []),
        (6, found(1.0, 1.0), ["live slices, W"]),
        (5, found(0.9985, 1.04), ["max cosine, W", "L2 ratio, W"]),
        (0, found(None, None), ["max cosine, W", "L2 ratio, W", "live slices, W"]),
    ],
)
def test_a_verdict_by_hand(live, parts, broken):
    verdict = judge([{"live": {"W": live, "WT": 3}, "parts": {"W": parts}}], claims(load_recipe("tms-5-2")))
    assert [name.removeprefix("tms-5-2: ") for name in verdict.broken[0]] == broken
    assert verdict.passed == (not broken)


@pytest.mark.parametrize("name", [name for names in EXPERIMENTS.values() for name in names])
def test_every_recipe_of_an_experiment_is_shipped_and_published(name):
    assert name in shipped()
    full = load_recipe(name.removesuffix("-quick")).recipe.target
    assert load_recipe(name).recipe.target == full  # a quick recipe takes the same toy apart
    assert claims(load_recipe(name))


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        ("induction-quick", "seed=0", "[target] kind = 'induction': its parts are not known"),
        ("tms-5-2", "target.features=6", "[target] the paper has no toy of this size: (6, 2, False)"),
        ("tms-5-2", "slices.matrices=['W']", "[slices] matrices: the paper takes all of them apart; leave it out"),
    ],
)
def test_what_nothing_is_published_of(recipe, setting, message):
    with pytest.raises(RecipeError) as caught:
        claims(load_recipe(recipe, [setting]))
    assert caught.value.message.endswith(message)


SHORT = ["train.steps=30", "train.batch=16", "decompose.steps=4", "decompose.batch=8", "slices.C=6"]


def test_an_experiment_from_end_to_end(monkeypatch, capsys, tmp_path: Path):
    spd = spd_here(monkeypatch, capsys)
    monkeypatch.chdir(tmp_path)
    settings = [word for setting in SHORT for word in ("--set", setting)]
    command = [
        "reproduce",
        "tms",
        "--recipe",
        "tms-5-2",
        "--seeds",
        "2",
        "--sequences",
        "64",
        "--out",
        "two",
        *settings,
    ]
    code, out, err = spd(*command, "--json")
    data = json.loads(out)
    assert code == 1  # a toy that has hardly been trained
    one_line("\n".join(err.splitlines()[-2:]), "0 of 2 seeds meet every stated bound", "tms-5-2: ")
    assert data["schema"] == "spd.reproduce/1"
    assert data == json.loads(Path("two/reproduce.json").read_text())
    assert [row["name"] for row in data["rows"]] == [claim.name for claim in claims(load_recipe("tms-5-2"))]
    assert [(seed["seed"], seed["recipe"]) for seed in data["seeds"]] == [(0, "tms-5-2"), (1, "tms-5-2")]
    for number, seed in enumerate(data["seeds"]):
        measured = json.loads(Path(f"two/tms-5-2/seed-{number}/eval.json").read_text())
        assert seed["metrics"] == measured["metrics"]
        assert seed["passed"] is False
    live = [json.loads(Path(f"two/tms-5-2/seed-{n}/eval.json").read_text())["live"]["W"] for n in (0, 1)]
    row = next(row for row in data["rows"] if row["name"] == "tms-5-2: live slices, W")
    assert row["ours"] == sum(live) / 2
    toys = [Path(f"two/tms-5-2/seed-{n}/toy/target.safetensors") for n in (0, 1)]
    written = [toy.stat().st_mtime_ns for toy in toys]
    assert json.loads(spd(*command, "--json")[1])["rows"] == data["rows"]
    assert [toy.stat().st_mtime_ns for toy in toys] == written  # what is finished is reused
    assert toys[0].read_bytes() != toys[1].read_bytes()
    table = spd(*command)[1]
    assert "Known parts" in table
    assert "tms-5-2, seed 1, breaks" in table


def test_options_of_other_experiments_are_refused(monkeypatch, capsys):
    spd = spd_here(monkeypatch, capsys)
    assert spd("reproduce", "tms", "--same-toy")[0] == 2
    one_line(spd("reproduce", "resid-mlp", "--pair", "athletes")[2], "--pair is for the facts experiment")


def test_the_baselines_of_an_experiment(monkeypatch, capsys, tmp_path: Path):
    spd = spd_here(monkeypatch, capsys)
    monkeypatch.chdir(tmp_path)
    settings = [word for setting in SHORT for word in ("--set", setting)]
    command = ["reproduce", "tms", "--recipe", "tms-5-2", "--sequences", "64", "--out", "one", *settings, "--json"]
    data = json.loads(spd(*command)[1])
    methods = {row["method"]: row for row in data["methods"]}
    assert list(methods) == ["apd", "svd", "greedy_svd", "weighted_svd"]
    assert methods["svd"]["own"] == 0  # singular slices are on for every feature
    assert 0 < methods["svd"]["mean_max_cosine"] < 0.999  # two slices for five directions of a plane
    (seed,) = data["seeds"]
    assert seed["baselines"]["svd"]["W"] == {key: methods["svd"][key] for key in ("mean_max_cosine", "l2_ratio", "own")}
    assert json.loads(spd(*command)[1])["methods"] == data["methods"]
