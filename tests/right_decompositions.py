"""Decompositions of a small toy that are right by construction, or broken so that importance masks do not tell."""

from __future__ import annotations

from pathlib import Path

import torch
from small_runs import loud_toy, toy_recipe

from spdcli.run import Run
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import toy_subject

ALL = ["Q0", "K0", "V0", "Q1", "K1", "V1"]


@torch.no_grad()
def right_run(folder: Path, *settings: str) -> Run:
    """All of W in the slices of every matrix, eight of which are fully on; the other two are off and do nothing."""
    recipe = toy_recipe("slices.C=10", "importance.gate_bias=2.0", *settings, folder=folder)
    subject = toy_subject(recipe, loud_toy(recipe))
    decomposition = start_decomposition(recipe, subject, ALL)
    for gate in decomposition.importances.gates.values():
        gate.w2.zero_()
        gate.b2[8:] = -9
    return Run(None, recipe, subject, decomposition)


@torch.no_grad()
def hide_a_pair(run: Run) -> Run:
    """Two slices of V1 that cancel each other and are never active: U V is W still, and every plain corner holds."""
    own = run.decomposition.of("V1")
    own.U[:, 8], own.V[8] = own.U[:, 0] * 3, 0.1 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    own.U[:, 9], own.V[9] = own.U[:, 8], -own.V[8]
    return run
