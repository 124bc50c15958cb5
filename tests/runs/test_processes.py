"""Runs that several processes make together: the same as by one, gone on with by another number, and killed."""

from __future__ import annotations

import os
import signal

import pytest
from small_runs import MODEL, ROOT, TOY, save_toy, toy_recipe

import spdcli
from spdcli.errors import Interrupted, SpdError, UsageError
from spdcli.files import load_tensors
from spdcli.progress import silent
from spdcli.runs.directory import DECOMPOSITION, RunDirectory
from spdcli.runs.launching import launch

TOLERANCE = 1e-9  # float64, after sums in another order
PROMPTS = {"target.dtype": "float64", "losses.stochastic_recon_layerwise": 0.5, "losses.recon_partial": 1}
TEXT = {"data.stream_length": 6, "decompose.batch": 5, "importance.kind": "shared", "losses.frequency": 0.1}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].double() - tensor.double()).abs().max() <= tolerance * tensor.double().abs().max(), name


def test_two_processes_make_the_runs_of_one_and_one_that_dies_ends_all(tiny_llama_dir, tmp_path):
    """Two prompts, divided by rows and kept in memory; a text, divided by sequences, in a directory."""
    recipe, text = tmp_path / "model.toml", tmp_path / "text.txt"
    recipe.write_text(MODEL.replace("MODEL", str(tiny_llama_dir)))
    text.write_text("Kobe Bryant plays professional basketball. " * 20)
    runs = {"prompts": PROMPTS, "text": PROMPTS | TEXT | {"data": str(text), "out": str(tmp_path / "two")}}
    request = {"recipe": str(recipe), "folder": str(tmp_path), "runs": runs}
    with pytest.raises(SpdError, match="process 1 of the run was ended by SIGKILL"):
        launch(2, "work_together:decompose_and_die", request, silent)
    for name, settings in runs.items():
        expected = spdcli.decompose(recipe, **settings | {"out": None}).decomposition.state_dict()
        for rank in range(2):
            close(load_tensors(tmp_path / f"{name}-{rank}")[0], expected, TOLERANCE)
    close(load_tensors(tmp_path / "two" / DECOMPOSITION)[0], expected, TOLERANCE)
    assert [record["step"] for record in RunDirectory(tmp_path / "two").metrics()] == [1, 2]


def test_a_run_of_two_processes_stops_at_a_signal_and_goes_on_by_one(tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(TOY)
    settings = {"target.path": str(save_toy(tmp_path / "toy", toy_recipe(folder=tmp_path)))}
    alone = spdcli.decompose(recipe, tmp_path / "one", **settings)

    def stop(progress):
        if progress.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"stopped after step . of 8; everything is saved"):
        spdcli.decompose(recipe, tmp_path / "two", nproc=2, progress=stop, **settings)
    there = RunDirectory(tmp_path / "two").metrics()
    assert 3 <= there[-1]["step"] < 8
    run = spdcli.decompose(recipe, tmp_path / "two", resume=True, **settings)
    for record, expected in zip(run.home.metrics(), alone.home.metrics(), strict=True):
        assert record["step"] == expected["step"]
        assert record["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    close(run.decomposition.state_dict(), alone.decomposition.state_dict(), 1e-3)  # float32, through 8 steps of Adam


def test_processes_write_a_directory_of_a_recipe(tmp_path):
    with pytest.raises(UsageError, match="nproc= is about a run directory"):
        spdcli.decompose("induction-quick", nproc=2)
