"""Results beside a run: believed while they are whole and of the decomposition that is there, and no longer."""

from __future__ import annotations

import json
import math

import pytest
from small_runs import one_line, save_toy, spd_here, toy_recipe

import spdcli
from spdcli.errors import Missing, SpdError
from spdcli.figures.run_files import write_evaluation
from spdcli.page.assemble import measured
from spdcli.runs.directory import DECOMPOSITION, EVAL
from spdcli.runs.results import checked_result, kept_result, write_result

DATA = {"schema": "spd.any/1", "value": 0.1 + 0.2, "list": [1, 2.0, None], "text": "é", "not": math.nan}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    toy = save_toy(folder / "trained", toy_recipe(folder=folder))
    return toy_recipe(f"target.path={toy}", "decompose.steps=2", folder=folder)


@pytest.fixture
def run(recipe, tmp_path):
    run = spdcli.decompose(recipe, tmp_path / "run")
    write_result(run.home, run.decomposition, "any.json", DATA)
    return run


def altered(run, name, **changes):
    path = run.home / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def go_on(run):
    """Train it further, which makes another decomposition of it."""
    return spdcli.decompose(run.recipe, run.home.path, resume=True, **{"decompose.steps": 4})


def test_a_result_is_read_as_it_was_written(run):
    read = checked_result(run.home, "any.json", "")
    assert {name: read[name] for name in DATA} == {**DATA, "not": None}
    assert kept_result(spdcli.load(run.home.path).home, "any.json", pytest.fail) == read
    with pytest.raises(Missing):
        checked_result(run.home, "other.json", "")
    assert kept_result(run.home, "other.json", pytest.fail) == {}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: altered(run, "any.json", value=0.3), "it does not hold what was written"),
        (lambda run: altered(run, "any.json", checksum=None), "it does not hold what was written"),
        (lambda run: (run.home / "any.json").write_text("{"), "not a JSON object"),
        (go_on, "of another decomposition, not of the decomposition.safetensors that is there now"),
    ],
)
def test_what_is_damaged_or_foreign_is_told_in_one_line(run, damage, said):
    damage(run)
    with pytest.raises(SpdError, match=said) as refused:
        checked_result(run.home, "any.json", "again")
    assert str(run.home / "any.json") in refused.value.message
    assert refused.value.hint == "again"
    heard = []
    assert kept_result(run.home, "any.json", heard.append) == {}
    (warned,) = heard
    assert warned.warning
    assert warned.text == f"{refused.value.message}; it is measured again"


def test_a_run_that_is_trained_to_the_same_end_keeps_its_results(run, recipe):
    (run.home / DECOMPOSITION).unlink()
    spdcli.decompose(recipe, run.home.path, resume=True)
    assert checked_result(run.home, "any.json", "")["schema"] == "spd.any/1"


def test_an_evaluation_of_another_decomposition_is_neither_shown_nor_shared(run, tmp_path, monkeypatch, capsys):
    spd = spd_here(monkeypatch, capsys)
    write_evaluation(run, run.evaluate(sequences=4))
    assert measured(run, 0, pytest.fail)["sequences"] == 4
    assert spd("push", run.home.path, "--out", tmp_path / "shared")[0] == 0
    shared = spdcli.load(tmp_path / "shared")
    assert checked_result(shared.home, EVAL, "")["run"] == "small"
    run, heard = go_on(run), []
    assert measured(run, 0, heard.append)["sequences"] > 4
    assert "of another decomposition" in heard[0].text
    code, _, err = spd("push", run.home.path, "--out", tmp_path / "again")
    assert code == 1
    one_line(err, "of another decomposition", f"spd eval {run.home} measures it again")
    assert not (tmp_path / "again").exists()
