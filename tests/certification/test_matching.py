"""Slices of two runs of one target, matched."""

from __future__ import annotations

import math

import pytest
import torch
from small_runs import loud_toy, toy_recipe

from spdcli.certification.matching import largest_cosines, matched
from spdcli.errors import UsageError
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.loading import LoadedRun
from spdcli.runs.subject import toy_subject


def test_largest_cosines_worked_out_by_hand():
    first = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -3.0]])
    second = torch.tensor([[-5.0, 0.0], [1.0, 2.0]])
    expected = [1.0, 3 / math.sqrt(10), 2 / math.sqrt(5)]
    assert largest_cosines(first, second).tolist() == pytest.approx(expected)
    assert largest_cosines(first, second[:0]).tolist() == [0, 0, 0]


@torch.no_grad()
def run_of(tmp_path, toy_seed=0, active=(0, 1, 2)):
    recipe = toy_recipe("importance.gate_bias=-9.0", folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe, toy_seed))
    decomposition = start_decomposition(recipe, subject, ["Q0", "V1"])
    for gate in decomposition.importances.gates.values():
        gate.w2.zero_()
        gate.b2[list(active)] = 2.0
    return LoadedRun(None, recipe, subject, decomposition)


@torch.no_grad()
def test_only_active_slices_count_and_neither_order_nor_size_nor_sign_does(tmp_path):
    run, other = run_of(tmp_path), run_of(tmp_path, active=(1, 2, 3))
    again = matched(run, run, 8, 0.0, seed=0)
    assert (again.U, again.V, again.slices) == (pytest.approx(1), pytest.approx(1), 6)
    for name in ("Q0", "V1"):  # singular directions are orthogonal: slice 0 has no partner, unless it is there
        own = other.decomposition.of(name)
        own.U[:, 2], own.U[:, 1] = -3 * own.U[:, 1], own.U[:, 2].clone()
        own.V[1] = 0.0
    found = matched(run, other, 8, 0.0, seed=0)
    assert pytest.approx(2 / 3, abs=1e-5) == found.U
    assert pytest.approx(1 / 3, abs=1e-5) == found.V


def test_runs_of_different_targets_have_no_common_basis(tmp_path):
    with pytest.raises(UsageError, match="another target"):
        matched(run_of(tmp_path), run_of(tmp_path, toy_seed=1), 8, 0.0, seed=0)
