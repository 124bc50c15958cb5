"""TensorBoard's event files say what metrics.jsonl says, of a run that was interrupted too."""

from __future__ import annotations

import importlib.util

import pytest
from small_runs import TOY, save_toy, toy_recipe

import spdcli
from spdcli.errors import UsageError
from spdcli.runs.tensorboard import scalars

needed = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")


@pytest.fixture
def recipe(tmp_path):
    toy = save_toy(tmp_path / "toy", toy_recipe(folder=tmp_path))
    path = tmp_path / "small.toml"
    path.write_text(TOY.replace('kind = "induction"', f'kind = "induction"\npath = "{toy}"'))
    return path


def events(run):
    """By tag, the last value that the event files have of every step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run.home / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: {one.step: one.value for one in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


@needed
def test_events_are_the_metrics(recipe, tmp_path):
    run = spdcli.decompose(recipe, tmp_path / "run", **{"decompose.tensorboard": True})
    records, told = run.home.metrics(), events(run)
    assert len(records) > 1
    expected = [(record["step"], scalars(record)) for record in records]
    assert set(told) == set().union(*(numbers for _, numbers in expected))
    for step, numbers in expected:
        for tag, value in numbers.items():
            assert told[tag][step] == pytest.approx(value, rel=1e-6)


@needed
def test_a_run_that_goes_on_has_every_step_once(recipe, tmp_path):
    settings = {"decompose.tensorboard": True, "decompose.log_every": 1}
    first = spdcli.decompose(recipe, tmp_path / "run", **settings)
    steps = first.home.recipe.decompose.steps
    run = spdcli.decompose(recipe, tmp_path / "run", resume=True, **settings, **{"decompose.steps": steps + 2})
    assert sorted(events(run)["total"]) == [record["step"] for record in run.home.metrics()]
    assert run.home.metrics()[-1]["step"] == steps + 2


def test_nothing_is_written_unless_it_is_wanted(recipe, tmp_path):
    run = spdcli.decompose(recipe, tmp_path / "run")
    assert not (run.home / "tensorboard").exists()


def test_what_cannot_be_written_is_told_first(recipe, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"decompose\.tensorboard is about a run directory"):
        spdcli.decompose(recipe, **{"decompose.tensorboard": True})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="TensorBoard is not installed"):
        spdcli.decompose(recipe, tmp_path / "run", **{"decompose.tensorboard": True})
    assert not (tmp_path / "run").exists()
