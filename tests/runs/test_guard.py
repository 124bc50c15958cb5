"""Runs that come to nothing: warned, stopped or gone back from; and what is known before their first step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_runs import MODEL, TOY, save_toy, toy_recipe

import spdcli
from spdcli.engine.all_off import losses_all_off
from spdcli.engine.fit import fit
from spdcli.engine.forward import clean_pass
from spdcli.engine.losses import divergence
from spdcli.errors import Collapsed, NotFinite
from spdcli.recipe.choices import COLLAPSES
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.directory import DECOMPOSITION, RunDirectory
from spdcli.runs.guard import REWINDS, shortfalls
from spdcli.runs.settings import loss_settings
from spdcli.runs.subject import open_subject

OFF = {"importance.gate_bias": -50.0}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "toy.toml"
    save_toy(tmp_path / "trained", toy_recipe(folder=tmp_path))
    path.write_text(TOY.replace("[train]", f'path = "{tmp_path / "trained"}"\n\n[train]'))
    return path


def warnings_of(recipe, **settings):
    heard = []
    run = spdcli.decompose(recipe, progress=heard.append, **settings)
    return run, [progress.text for progress in heard if progress.warning]


# --- what the losses are with every slice off ------------------------------------------------------


def test_losses_all_off_are_those_of_a_target_without_its_matrices(recipe, tmp_path):
    loaded = toy_recipe("losses.relative_faithfulness=1", "losses.recon=1", "losses.recon_partial=1", folder=tmp_path)
    subject = open_subject(loaded, torch.device("cpu"), tmp_path / "trained")
    target, names = subject.target, list(subject.target.matrices)
    decomposition = start_decomposition(loaded, subject, names)
    clean = clean_pass(target, subject.batches(torch.Generator().manual_seed(0)), names)
    off = losses_all_off(target, decomposition, clean, loss_settings(loaded), 2**30)

    def without(*removed):
        """KL to the target, a mean over looked-at positions, of the target with these weights at 0."""
        kept = {name: target.matrices[name].weight.clone() for name in removed}
        for name in removed:
            target.matrices[name].weight.zero_()
        try:
            logits = clean_pass(target, clean.batch, names).outputs
        finally:
            for name, weight in kept.items():
                target.matrices[name].weight.copy_(weight)
        return divergence(clean.outputs, logits).mean().item()

    with torch.no_grad():
        assert off["recon"] == off["stochastic_recon"] == pytest.approx(without(*names), rel=1e-4)
        alone = [without(name) for name in names]
    assert off["recon_layerwise"] == pytest.approx(sum(alone) / len(alone), rel=1e-4)
    assert min(alone) - 1e-6 <= off["recon_partial"] <= 2 * max(*alone, off["recon"])
    weights = torch.cat([matrix.weight.flatten() for matrix in target.matrices.values()])
    assert off["faithfulness"] == pytest.approx(weights.square().mean().item(), rel=1e-5)
    assert off["relative_faithfulness"] == 1
    assert "minimality" not in off


# --- before the first step -------------------------------------------------------------------------


def test_slices_that_cannot_be_enough_are_counted_by_what_they_leave_out():
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    target = SimpleNamespace(matrices={"m": SimpleNamespace(weight=weight)})
    valid = torch.tensor([[True, True, True, True, False]])
    x = torch.cat([torch.eye(4), torch.full((1, 4), 9.0)])[None]
    clean = SimpleNamespace(inputs={"m": x}, batch=SimpleNamespace(valid=valid))
    assert shortfalls(target, ["m"], clean, 4) == {}
    assert shortfalls(target, ["m"], clean, 3) == {}  # the fourth direction has no weight
    assert shortfalls(target, ["m"], clean, 2) == {"m": pytest.approx(1 / 14)}
    assert shortfalls(target, ["m"], clean, 1) == {"m": pytest.approx(5 / 14)}


def test_few_slices_and_small_batches_are_told_before_the_first_step(tiny_gpt2_dir, tmp_path):
    path = tmp_path / "model.toml"
    prompts = "".join(f'  "golf of the sport {number}",\n' for number in range(19))
    path.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)).replace("prompts = [\n", f"prompts = [\n{prompts}"))
    run, (few_slices, small_batch) = warnings_of(path)
    assert few_slices.startswith(
        "before step 1: slices.C = 6 is below the span of the data in 3 matrices: of what h.1."
    )
    assert few_slices.endswith("% out; raise slices.C")
    assert small_batch == (
        "before step 1: a batch has 2 of 21 prompts: gates meet each of them once in 10 steps; raise decompose.batch"
    )
    _, warned = warnings_of(path, **{"slices.C": 32, "data.prompts": run.recipe.data.prompts[:19]})
    assert warned == []


def test_what_is_told_before_the_first_step_is_logged_once(recipe, tmp_path):
    settings = {"slices.C": 1, "slices.init": "random"}
    spdcli.decompose(recipe, tmp_path / "whole", **settings)
    spdcli.decompose(recipe, tmp_path / "run", **settings, **{"decompose.steps": 4})
    spdcli.decompose(recipe, tmp_path / "run", resume=True, **settings)
    whole, run = ([r.get("warnings") for r in RunDirectory(tmp_path / name).metrics()] for name in ("whole", "run"))
    assert [one["kind"] for one in whole[0]] == ["few_slices"]
    assert run == whole


# --- on_collapse -----------------------------------------------------------------------------------


def test_a_collapse_is_told_and_logged(recipe, tmp_path):
    _, warned = warnings_of(recipe, out=tmp_path / "run", **OFF)
    line = "step 1: no slice is on anywhere, of 30; raise importance.gate_bias, which is -50"
    assert line in warned
    logged = [record.get("warnings", []) for record in RunDirectory(tmp_path / "run").metrics()]
    assert logged[0][-1] == {
        "kind": "nothing_on",
        "step": 1,
        "value": 0,
        "text": "no slice is on anywhere, of 30",
        "setting": "raise importance.gate_bias, which is -50",
        "collapse": True,
    }
    assert not any(logged[1:])


def test_a_collapse_stops_where_the_recipe_says_so(recipe, tmp_path):
    with pytest.raises(Collapsed, match="step 1: no slice is on anywhere") as stopped:
        spdcli.decompose(recipe, tmp_path / "run", **OFF, **{"decompose.on_collapse": "stop"})
    assert "raise importance.gate_bias" in stopped.value.hint
    run = RunDirectory(tmp_path / "run")
    assert run.has_checkpoint
    assert (run / DECOMPOSITION).exists()
    gone_on = {**OFF, "decompose.on_collapse": "warn"}
    assert len(spdcli.decompose(recipe, run.path, resume=True, **gone_on).home.metrics()) == 8


def spoilt(*bad, when):
    """`fit`, whose records at the steps `bad` have nothing on while `when(rate)`, the learning rate, says so."""

    def steps(*arguments):
        for record in fit(*arguments):
            if record is not None and record.step in bad and when(record.rate):
                record.active = dict.fromkeys(record.active, 0.0)
            yield record

    return steps


@pytest.mark.parametrize(("checkpoint_every", "back"), [(2, 4), (100, 0)])
def test_a_run_goes_back_to_what_was_good_at_half_the_rate(recipe, tmp_path, monkeypatch, checkpoint_every, back):
    monkeypatch.setattr("spdcli.runs.learning.fit", spoilt(5, 6, 7, when=lambda rate: rate > 0.006))
    settings = {"decompose.on_collapse": "rewind", "decompose.schedule": "constant"}
    settings["decompose.checkpoint_every"] = checkpoint_every
    run, warned = warnings_of(recipe, out=tmp_path / "run", **settings)
    assert warned[-1] == (
        f"step 6: no slice is on anywhere, of 30: going back to step {back}, with half the learning rate"
    )
    records = run.home.metrics()
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["rate"] for record in records] == [0.01] * back + [0.005] * (8 - back)
    assert all(sum(record["active"].values()) > 0 for record in records)


def test_a_rate_that_undoes_the_slices_stops_a_run_or_is_halved(recipe, tmp_path):
    hot = {"decompose.learning_rate": 4.0, "decompose.schedule": "constant"}
    with pytest.raises(Collapsed, match="step 1: a step moves the numbers of U and V by about 4, and their") as stopped:
        spdcli.decompose(recipe, **hot, **{"decompose.on_collapse": "stop"})
    assert stopped.value.hint.startswith("lower decompose.learning_rate; or --resume")
    heard = []
    hot["decompose.on_collapse"] = "rewind"
    run = spdcli.decompose(recipe, tmp_path / "run", **hot, progress=heard.append)
    told = [one.text for one in heard if "going back to step 0, with half the learning rate" in one.text]
    rate, size = run.home.metrics()[0]["rate"], float(told[-1].split(" is ")[1].split(":")[0])
    assert rate == 4.0 / 2 ** len(told)
    assert rate < size <= 2 * rate


def test_a_rate_that_was_halved_stays_so_when_a_run_goes_on(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("spdcli.runs.learning.fit", spoilt(5, 6, 7, when=lambda rate: rate > 0.006))
    settings = {"decompose.on_collapse": "rewind", "decompose.schedule": "constant"}
    spdcli.decompose(recipe, tmp_path / "run", **settings)
    longer = spdcli.decompose(recipe, tmp_path / "run", resume=True, **settings, **{"decompose.steps": 10})
    assert longer.home.metrics()[-1]["rate"] == 0.005


@pytest.mark.parametrize("out", ["run", None])
def test_a_run_that_never_gets_well_stops(recipe, tmp_path, monkeypatch, out):
    rates = []

    def when(rate):
        rates.append(rate)
        return True

    monkeypatch.setattr("spdcli.runs.learning.fit", spoilt(3, 4, when=when))
    settings = {"decompose.on_collapse": "rewind", "decompose.schedule": "constant"}
    with pytest.raises(Collapsed, match="step 4"):
        spdcli.decompose(recipe, out and tmp_path / out, **settings)
    assert min(rates) == 0.01 / 2**REWINDS


def test_a_loss_that_is_not_finite_is_gone_back_from_too(recipe, tmp_path, monkeypatch):
    def breaks(*arguments):
        for record in fit(*arguments):
            if record.step == 5 and record.rate > 0.006:
                raise NotFinite("step 5: loss x is nan", "hint", 5)
            yield record

    monkeypatch.setattr("spdcli.runs.learning.fit", breaks)
    settings = {"decompose.schedule": "constant"}
    with pytest.raises(NotFinite):
        spdcli.decompose(recipe, tmp_path / "other", **settings)
    run, warned = warnings_of(recipe, out=tmp_path / "run", **settings, **{"decompose.on_collapse": "rewind"})
    assert warned[-1] == "step 5: loss x is nan: going back to step 4, with half the learning rate"
    assert run.home.metrics()[-1]["rate"] == 0.005


def test_what_becomes_of_a_collapse_changes_no_run_that_has_none(recipe):
    runs = [spdcli.decompose(recipe, **{"decompose.on_collapse": choice}) for choice in COLLAPSES]
    first, *others = [run.decomposition.state_dict() for run in runs]
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
