"""Toys whose circuit is looked at: with uneven gates, and with a previous-token head that was put there by hand."""

from __future__ import annotations

import math

import torch
from small_runs import loud_toy, toy_recipe

from spdcli.measures.circuit_data import circuit_data
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import toy_subject

ALL = ["Q0", "K0", "V0", "Q1", "K1", "V1"]
SEQUENCES = 5


def uneven_gates(decomposition, seed=5):
    """Gates that differ by slice and position; the last slice of every matrix is active nowhere."""
    torch.manual_seed(seed)
    for name, parameter in decomposition.importances.named_parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.3)
        if name.endswith("b2"):
            parameter += 0.6
            parameter[-1] = -9
    return decomposition


def small_circuit(tmp_path, *settings, names=ALL, sequences=SEQUENCES):
    recipe = toy_recipe("target.d_model=4", "target.vocabulary=5", "slices.C=3", *settings, folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe, seed=1))
    return circuit_data(subject, uneven_gates(start_decomposition(recipe, subject, names)), sequences, 0.0, seed=0)


def planted_circuit(tmp_path):
    """Layer 1 attends to the previous position by its encoding alone: keys are turned one position further."""
    recipe = toy_recipe("target.d_model=8", "slices.C=8", "importance.gate_bias=2.0", folder=tmp_path)
    toy = loud_toy(recipe)
    toy.embed.weight.zero_()
    for block in toy.blocks:
        for matrix in (block.q, block.k, block.v):
            matrix.weight.zero_()
    frequencies = torch.exp(torch.arange(0, 8, 2) * (-math.log(10000.0) / 8))
    turn = torch.block_diag(*(torch.tensor([[f.cos(), -f.sin()], [f.sin(), f.cos()]]) for f in frequencies))
    torch.testing.assert_close(toy.positions[:-1] @ turn, toy.positions[1:], atol=1e-5, rtol=0)
    toy.blocks[0].q.weight.copy_(300 * torch.eye(8))
    toy.blocks[0].k.weight.copy_(turn.t())
    subject = toy_subject(recipe, toy)
    decomposition = start_decomposition(recipe, subject, ALL)
    for gate in decomposition.importances.gates.values():
        gate.w2.zero_()  # every slice fully on
    return circuit_data(subject, decomposition, 40, 0.0, seed=0)
