"""`spd compare`: one run a setting, at equal steps and in equal time, reused when it is there."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from small_runs import TOY, one_line, spd_here

from spdcli import comparison
from spdcli.runs.directory import METRICS, RunDirectory


@pytest.fixture
def spd(monkeypatch, capsys):
    return spd_here(monkeypatch, capsys)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(TOY)
    return path


def test_a_run_at_equal_steps_and_one_in_equal_time(spd, recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    setting_run = comparison.setting_run

    def timed(folder, name, loaded, *rest):
        """Steps that take what the test says: 3 s as the recipe is, 1 s with fewer matrices, 4 s with more slices."""
        each = {"as-it-is": 3.0, "1": 1.0, "2": 4.0}[folder.name.split("-equal")[0]]
        return replace(setting_run(folder, name, loaded, *rest), seconds=each * loaded.recipe.decompose.steps)

    monkeypatch.setattr(comparison, "setting_run", timed)
    given = ["--with", "losses.layerwise_matrices=2", "--with", "slices.C=9", "--out", out, "--sequences", "8"]
    code, text, _ = spd("compare", recipe, *given, "--json")
    assert code == 0
    data = json.loads(text)
    rows = {row["run"].rsplit("/", 1)[1]: row for row in data["rows"]}
    assert data["schema"] == "spd.compare/1"
    assert [row["with"] for row in data["rows"]] == ["the recipe as it is", *[given[1]] * 2, given[3]]
    # Three times as fast, three times the 8 steps; what is slower gets no second run.
    assert {name: row["steps"] for name, row in rows.items()} == {
        "as-it-is": 8,
        "1-equal-steps": 8,
        "1-equal-time": 24,
        "2-equal-steps": 8,
    }
    assert RunDirectory.open(out / "1-equal-time").recipe.losses.layerwise_matrices == 2
    assert RunDirectory.open(out / "2-equal-steps").recipe.slices.C == 9
    toys = {(out / name / "toy/target.safetensors").read_bytes() for name in rows}
    assert len(toys) == 1  # trained once
    assert len({row["metrics"]["recon"] for row in rows.values()}) == 4
    assert json.loads((out / "compare.json").read_text()) == data

    before = {name: (out / name / METRICS).stat().st_mtime_ns for name in rows}
    code, text, _ = spd("compare", recipe, *given)
    assert code == 0
    assert text.splitlines()[-1] == str(out)
    assert {name: (out / name / METRICS).stat().st_mtime_ns for name in rows} == before


def test_settings_that_belong_together_and_equal_steps_alone(spd, recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    setting_run = comparison.setting_run

    def timed(folder, *rest):
        return replace(setting_run(folder, *rest), seconds=9.0 if folder.name == "as-it-is" else 1.0)

    monkeypatch.setattr(comparison, "setting_run", timed)
    change = "slices.C=9; losses.faithfulness=0;losses.relative_faithfulness=1"
    given = ["--with", change, "--equal-steps", "--set", "decompose.steps=4", "--out", out, "--sequences", 8]
    code, text, _ = spd("compare", recipe, *given, "--json")
    assert code == 0
    first, second = json.loads(text)["rows"]
    assert [row["with"] for row in (first, second)] == ["the recipe as it is", given[1]]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["1-equal-steps", "as-it-is"]
    losses = RunDirectory.open(out / "1-equal-steps").recipe.losses
    assert (losses.faithfulness, losses.relative_faithfulness) == (0, 1)
    for row in (first, second):
        assert 0 <= row["l0_above_tenth"] <= row["l0"] <= 9 * 6
        assert sum(row["unique"].values()) == row["total_active"]
        places = row["active_by_class"]
        assert {name for name, kinds in places.items() if any(kinds.values())} == {
            name for name, count in row["unique"].items() if count
        }
    assert first["l0"] > 0


def test_of_a_toy_of_sparse_features_the_known_parts_are_told(spd, tmp_path):
    out = tmp_path / "out"
    short = [word for setting in ("decompose.steps=4", "train.steps=20") for word in ("--set", setting)]
    given = ["tms-5-2-quick", *short, "--with", "slices.C=9", "--equal-steps", "--out", out, "--sequences", 64]
    code, text, _ = spd("compare", *given, "--json")
    assert code == 0
    rows = json.loads(text)["rows"]
    assert [set(row) & {"evidence", "active_by_class"} for row in rows] == [set(), set()]
    assert [list(row["live"]) for row in rows] == [["W", "WT"]] * 2
    code, text, _ = spd("eval", out / "1-equal-steps", "--json")
    assert code == 0
    evaluation = json.loads(text)
    assert rows[1]["parts"] == evaluation["parts"]
    assert rows[1]["live"] == evaluation["live"]
    code, text, _ = spd("compare", *given)
    assert code == 0
    assert "Known parts" in text
    assert f"{rows[1]['parts']['W']['mean_max_cosine']:.4f}" in text


def test_a_setting_that_is_none_is_told_before_anything_runs(spd, recipe, tmp_path):
    code, _, err = spd("compare", recipe, "--with", "slices.D=3", "--out", tmp_path / "out")
    assert code == 2
    one_line(err, "slices.D")
    assert not (tmp_path / "out").exists()
