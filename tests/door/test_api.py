"""From a recipe to a run in memory or in a directory, as the commands do it; and the door itself."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from door_checks import equal
from small_runs import TOY, spd_here

import spdcli
from spdcli.runs.signals import StopSignals
from spdcli.runs.training import SURE


def test_in_memory_is_the_run_directory_bit_for_bit(recipe, toy_run, tmp_path, monkeypatch, capsys):
    code, _, err = spd_here(monkeypatch, capsys)("decompose", recipe, "--out", tmp_path / "run", "-q")
    assert code == 0, err
    assert toy_run.directory is None
    assert equal(toy_run, spdcli.load(tmp_path / "run"))


def test_a_toy_is_trained_in_memory_as_it_is_into_a_directory(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(TOY)
    inside = spdcli.decompose(path)
    outside = spdcli.decompose(path, tmp_path / "run")
    assert equal(inside, outside)
    assert (tmp_path / "run/toy/figures/training.png").is_file()
    assert not any(tmp_path.glob("*toy*"))


def test_nothing_is_written_in_memory(model_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spdcli.decompose(model_file)
    assert not list(tmp_path.iterdir())


def test_settings_seed_and_progress(recipe):
    lines = []
    run = spdcli.decompose(recipe, progress=lines.append, seed=7, **{"decompose.steps": 3, "losses.minimality": 0.3})
    assert (run.recipe.seed, run.recipe.decompose.steps, run.recipe.losses.minimality) == (7, 3, 0.3)
    assert [(line.done, line.total) for line in lines if line.total] == [(1, 3), (2, 3), (3, 3)]
    assert str(lines[-1]).startswith("3/3  loss ")


def test_steps_between_records_are_told_to_who_hears_them(recipe):
    class Steps(list):
        hears_steps = True
        __call__ = list.append

    heard, records = Steps(), []
    for progress in (heard, records.append):
        spdcli.decompose(recipe, progress=progress, **{"decompose.steps": 8, "decompose.log_every": 4})
    assert [(one.done, one.step_only) for one in heard if one.total] == [
        (step, step not in (1, 4, 8)) for step in range(1, 9)
    ]
    assert [one.done for one in records if one.total] == [1, 4, 8]
    last = records[-1]
    assert list(last.numbers)[:3] == ["loss", "recon", "active"]
    assert last.numbers["active"] == pytest.approx(sum(last.groups.values()))
    assert list(last.groups) == ["Q0", "K0", "V0", "Q1", "K1", "V1"]
    assert last.numbers["recon"] in last.terms.values()


def test_a_recipe_may_be_its_sections(recipe, toy_run):
    sections = spdcli.api.load_recipe(recipe).recipe.model_dump(exclude_none=True)
    before = repr(sections)
    run = spdcli.decompose(sections, **{"decompose.steps": 8})
    assert equal(run, toy_run)
    assert repr(sections) == before
    assert equal(spdcli.decompose(toy_run.recipe), toy_run)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decompose.stepz": 3}, "stepz"),
        ({"decompose.steps": 0}, "decompose.steps=0"),
        ({"no key": 1}, "is no setting"),
        ({"steps": 3}, "is no setting"),
    ],
)
def test_mistakes_are_the_commands_own(recipe, settings, said):
    with pytest.raises(spdcli.UsageError if said == "is no setting" else spdcli.RecipeError, match=said):
        spdcli.decompose(recipe, **settings)


def test_a_directory_that_holds_a_run_is_refused(recipe, tmp_path):
    spdcli.decompose(recipe, tmp_path / "run")
    with pytest.raises(spdcli.UsageError, match="holds another run"):
        spdcli.decompose(recipe, tmp_path / "run")
    resumed = spdcli.decompose(recipe, tmp_path / "run", resume=True, **{"decompose.steps": 9})
    assert resumed.home.metrics()[-1]["step"] == 9
    with pytest.raises(spdcli.UsageError, match="run directory"):
        spdcli.decompose(recipe, resume=True)


def test_ctrl_c_in_memory_says_that_nothing_was_kept(recipe, monkeypatch):
    def press(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("spdcli.runs.learning.start_decomposition", press)
    with pytest.raises(spdcli.Interrupted, match="nothing was kept"):
        spdcli.decompose(recipe)


def test_it_works_outside_the_main_thread(recipe, toy_run):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert equal(pool.submit(spdcli.decompose, recipe).result(), toy_run)


def test_a_toy_is_trained(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(TOY)
    warnings = []
    trained = spdcli.train_toy(path, progress=warnings.append, **{"train.steps": 3})
    assert trained.records[-1]["step"] == 3
    assert trained.accuracy < SURE
    assert [line for line in warnings if line.warning and "train it longer" in line.text]
    again = spdcli.train_toy(path, tmp_path / "toy", **{"train.steps": 3})
    assert all(torch.equal(a, b) for a, b in zip(trained.toy.parameters(), again.toy.parameters(), strict=True))
    assert (tmp_path / "toy/figures/training.svg").is_file()


def test_the_door_is_light_and_typed():
    code = (
        "import sys, spdcli; dir(spdcli); spdcli.SpdError;"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & {*sys.modules};"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0
    for name in spdcli.__all__:
        assert getattr(spdcli, name).__doc__ or name == "__version__"
        assert name in dir(spdcli)
    assert (Path(spdcli.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="nothing"):
        spdcli.nothing  # noqa: B018


@pytest.mark.parametrize("recipe", [None, 5, ["induction-quick"]])
def test_what_is_no_recipe(recipe):
    with pytest.raises(spdcli.UsageError, match="a recipe is no"):
        spdcli.decompose(recipe)


def test_a_place_that_cannot_be_written_is_one_line(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(spdcli.SpdError, match="cannot be written"):
        spdcli.decompose(recipe, tmp_path / "file" / "run")
    with pytest.raises(spdcli.UsageError, match="progress= is a int"):
        spdcli.decompose(recipe, progress=5)


def test_a_stop_in_memory_says_that_nothing_is_kept(recipe, monkeypatch):
    monkeypatch.setattr("spdcli.runs.learning.stop_signals", contextmanager(lambda: iter([StopSignals([1])])))
    with pytest.raises(spdcli.Interrupted, match="after step 1 of 8; nothing is kept"):
        spdcli.decompose(recipe)
