"""All methods of `spd svd` together: the record, the figure and the command."""

from __future__ import annotations

import copy
import json
from typing import get_args

import pytest
import torch
from pruned_by_hand import (
    ALL,
    DOUBLE,
    SEED,
    SEQUENCES,
    toy_data,
)
from small_runs import MODEL, TOY, one_line, save_toy, spd_here, toy_recipe

from spdcli.commands.svd import MethodOption
from spdcli.engine.forward import clean_pass
from spdcli.errors import UsageError
from spdcli.measures.svd import CURVES, compare_methods, svd_curves
from spdcli.measures.svd_methods import METHODS
from spdcli.progress import Progress
from spdcli.records import ABSENT, plain


def test_every_method_of_the_table_has_a_curve_and_words():
    assert list(METHODS) == list(CURVES)
    assert len({method.legend for method in METHODS.values()}) == len(METHODS)
    (help_text,) = (option.help for option in get_args(MethodOption)[1:])
    assert all(f"{name} {method.description}" in help_text for name, method in METHODS.items())


@torch.no_grad()
def test_every_method_keeps_less_and_less_and_says_what_it_does(tmp_path):
    subject, decomposition, data = toy_data(tmp_path)
    steps: list[Progress] = []
    comparison = compare_methods(data, list(METHODS), 0.05, report=steps.append)
    assert comparison == svd_curves(subject, decomposition, tolerance=0.05, sequences=SEQUENCES, seed=SEED)
    assert {METHODS["greedy_svd"].legend, METHODS["weighted_svd"].legend} <= {progress.text for progress in steps}
    assert all(0 <= progress.done < progress.total for progress in steps)
    assert comparison.looked_at == SEQUENCES
    assert comparison.legend == {name: method.legend for name, method in METHODS.items()}
    for method, curve in comparison.curves.items():
        ranks = [point.rank for point in curve]
        assert ranks == sorted(set(ranks), reverse=True), method
        assert ranks[-1] == 0
        assert all(point.kl >= 0 for point in curve)
        assert all((point.threshold is ABSENT) == (method != "spd_per_position") for point in curve)
        result = comparison.result[method]
        if result is not None:
            assert result.kl <= 0.05
            assert result.total_rank == sum(result.ranks.values())
            assert result.kl in [point.kl for point in curve if point.rank == result.total_rank]
    assert plain(comparison.curves["greedy_svd"][0]) == {"rank": 48, "kl": 0.0}
    # With every rank at 0 all methods are the same model, but for what their threshold means.
    ends = {curve[-1].kl for curve in comparison.curves.values()}
    assert max(ends) == pytest.approx(min(ends), **DOUBLE)


def test_a_method_that_is_not_there_is_one_line(tmp_path):
    _, _, data = toy_data(tmp_path, ["V1"])
    with pytest.raises(UsageError, match="no method is called 'svd'") as info:
        compare_methods(data, ["spd", "svd"], 0.1)
    assert "weighted_svd" in info.value.hint


@torch.no_grad()
def test_the_target_is_left_as_it_was(tmp_path):
    subject, _, data = toy_data(tmp_path)
    before = copy.deepcopy(subject.toy.state_dict())
    compare_methods(data, list(METHODS), 0.1, step=4)
    assert all(torch.equal(before[key], value) for key, value in subject.toy.state_dict().items())
    after = clean_pass(subject.target, data.cleans[0].batch, ALL)
    assert torch.equal(after.log_probs, data.cleans[0].log_probs)


@pytest.fixture
def spd(monkeypatch, capsys):
    return spd_here(monkeypatch, capsys)


@pytest.fixture
def toy_run(spd, tmp_path):
    trained = save_toy(tmp_path / "trained", toy_recipe(folder=tmp_path))
    (tmp_path / "small.toml").write_text(TOY.replace('"induction"', f'"induction"\npath = "{trained}"'))
    assert spd("decompose", tmp_path / "small.toml", "--out", tmp_path / "run")[0] == 0
    return tmp_path / "run"


def no_constant(text):
    raise AssertionError(f"{text} is not JSON")


def test_the_command_on_a_toy(spd, toy_run):
    code, printed, _ = spd("svd", toy_run, "--json", "--sequences", 20, "--tolerance", 0.5)
    assert code == 0
    data = json.loads(printed, parse_constant=no_constant)
    assert (data["schema"], data["run"], data["tolerance"]) == ("spd.svd/1", str(toy_run), 0.5)
    assert list(data["curves"]) == list(data["result"]) == list(METHODS)
    assert all({"rank", "kl"} <= set(point) for curve in data["curves"].values() for point in curve)
    assert list(data["result"]["greedy_svd"]["ranks"]) == ALL
    assert data["result"]["greedy_svd"]["kl"] <= 0.5
    assert {path.name for path in (toy_run / "figures").iterdir()} == {"svd.png", "svd.svg", "svd.json"}
    assert json.loads((toy_run / "figures/svd.json").read_text()) == data
    assert spd("svd", toy_run, "--json", "--sequences", 20, "--tolerance", 0.5)[1] == printed
    other = json.loads(spd("svd", toy_run, "--json", "--sequences", 20, "--seed", 9)[1])
    assert other["curves"] != data["curves"]


def test_the_command_prints_a_table_and_ends_with_the_figure(spd, toy_run):
    code, printed, _ = spd("svd", toy_run, "--sequences", 8, "--method", "spd", "--method", "greedy_svd", "--step", 4)
    assert code == 0
    assert printed.splitlines()[-1] == str(toy_run / "figures/svd.png")
    assert "greedy SVD" in printed
    assert "weighted" not in printed
    assert all(name in printed for name in (*ALL, "total", "KL"))
    assert spd("svd", toy_run, "-q", "--sequences", 8)[1] == f"{toy_run / 'figures/svd.png'}\n"


def test_a_method_that_never_reaches_the_tolerance_says_how_far_it_got(spd, toy_run):
    arguments = ("svd", toy_run, "--sequences", 8, "--tolerance", 0, "--method", "spd")
    assert "at best" in spd(*arguments)[1]
    assert json.loads(spd(*arguments, "--json")[1])["result"] == {"spd": None}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_command_on_a_language_model(request, spd, tmp_path, kind):
    folder = request.getfixturevalue(f"tiny_{kind}_dir")
    (tmp_path / "model.toml").write_text(MODEL.replace("MODEL", str(folder)).replace('"*.1.*"', '"*.1.*mlp*"'))
    assert spd("decompose", tmp_path / "model.toml", "--out", tmp_path / "run")[0] == 0
    code, printed, err = spd("svd", tmp_path / "run", "--json", "--tolerance", 0.1, "--step", 8)
    assert code == 0, err
    data = json.loads(printed, parse_constant=no_constant)
    assert data["looked_at"] == 5 + 7  # K-obe and T-iger are two tokens each, and the last one is not fed
    assert data["result"]["weighted_svd"]["total_rank"] <= data["result"]["greedy_svd"]["total_rank"]
    assert (tmp_path / "run/figures/svd.svg").exists()
    assert "total" in spd("svd", tmp_path / "run", "--method", "weighted_svd")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tolerance", "-1"),
        ("--tolerance", "nan"),
        ("--tolerance", "inf"),
        ("--method", "svd"),
        ("--step", "0"),
        ("--sequences", "0"),
    ],
)
def test_what_makes_no_sense_is_refused(spd, tmp_path, arguments):
    code, printed, err = spd("svd", tmp_path, *arguments)
    assert (code, printed) == (2, "")
    assert arguments[0] in err


def test_a_directory_without_a_run_is_refused(spd, tmp_path):
    code, _, err = spd("svd", tmp_path)
    assert code == 2
    one_line(err, "no run here")
