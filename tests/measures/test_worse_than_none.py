"""A decomposition that is worth nothing says so: it is compared with every slice off, and NaN is refused."""

from __future__ import annotations

import json

import pytest
import torch
from small_runs import TOY, save_toy, spd_here, toy_recipe

import spdcli
from spdcli.engine.forward import clean_pass
from spdcli.engine.losses import divergence
from spdcli.measures.evaluation_data import evaluation_batches


@pytest.fixture
def run(tmp_path):
    toy = save_toy(tmp_path / "toy", toy_recipe(folder=tmp_path))
    path = tmp_path / "small.toml"
    path.write_text(TOY.replace('kind = "induction"', f'kind = "induction"\npath = "{toy}"'))
    return spdcli.decompose(
        path, tmp_path / "run", **{"slices.C": 8, "decompose.steps": 1, "decompose.learning_rate": 1e-9}
    )


def switch(run, off):
    """Gates that have every slice off, or on."""
    with torch.no_grad():
        for name, parameter in run.decomposition.importances.named_parameters():
            if name.endswith("b2"):
                parameter.fill_(-1e6 if off else 1e6)


@torch.no_grad()
def test_all_off_is_the_target_with_its_matrices_at_zero(run):
    evaluation = run.evaluate(64, adversary="none")
    target = run.subject.target
    (batch,) = evaluation_batches(run.subject, 64, evaluation.seed)
    whole = clean_pass(target, batch, run.matrices).log_probs
    for matrix in target.matrices.values():
        matrix.weight.zero_()
    nothing = divergence(whole, clean_pass(target, batch, run.matrices).log_probs).mean().item()
    assert evaluation.all_off == pytest.approx(nothing, rel=1e-5)
    assert nothing > 0.1


@pytest.mark.parametrize("off", [True, False])
def test_a_decomposition_that_is_worse_than_none_is_told(run, off, monkeypatch, capsys):
    switch(run, off)
    evaluation = run.evaluate(64, adversary="none")
    assert evaluation.worse_than_none == off
    assert (evaluation.metrics["recon"] == pytest.approx(evaluation.all_off, rel=1e-6)) == off
    run.home.save_decomposition(run.decomposition)
    code, out, err = spd_here(monkeypatch, capsys)("eval", run.home, "--sequences", 64, "--adversary", "none", "--json")
    assert (code, json.loads(out)["all_off"]) == (0, pytest.approx(evaluation.all_off))
    assert ("this decomposition is worse than none: recon is " in err) == off


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(run, value):
    with torch.no_grad():
        run.decomposition.of("V1").V[2, 3] = value
    with pytest.raises(spdcli.SpdError, match=r"1 of 64 numbers of slices\.V1\.V are not finite"):
        run.evaluate(64, adversary="none")
    with pytest.raises(spdcli.SpdError, match="not finite"):
        run.certify()
