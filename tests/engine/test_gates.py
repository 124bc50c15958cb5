"""The gate kernel against the hidden layer made whole: values, gradients, chunks, memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from twins import Watch, close, gradients

from spdcli.engine import gates
from spdcli.engine.gates import scalar_gates, vector_gates
from spdcli.engine.part_tables import ACTIVATIONS

N, I, C, G = 11, 5, 3, 4
ACTIVATION = pytest.mark.parametrize("activation", sorted(ACTIVATIONS))


def vector_twin(x, w1, b1, w2, b2, activation):
    """`[N, G, C]` made whole."""
    hidden = torch.einsum("ni,igc->ngc", x, w1.view(-1, *w2.shape)) + b1.view(w2.shape)
    return (getattr(F, activation)(hidden) * w2).sum(1) + b2


def scalar_twin(x, w1, b1, w2, b2, activation):
    return (getattr(F, activation)(x[:, None] * w1 + b1) * w2).sum(1) + b2


KINDS = {
    "vector": (vector_gates, vector_twin, [(N, I), (I, C * G), (C * G,), (G, C), (C,)]),
    "scalar": (scalar_gates, scalar_twin, [(N, C), (G, C), (G, C), (G, C), (C,)]),
}
KIND = pytest.mark.parametrize("kind", sorted(KINDS))


def tensors(kind):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in KINDS[kind][2]]


@KIND
@ACTIVATION
@pytest.mark.parametrize("rows", [1, 4, 10, N, 100])  # tokens a chunk, of 11: ragged, all but one, whole, room to spare
def test_gates_are_independent_mlps(kind, activation, rows, monkeypatch):
    monkeypatch.setattr(gates, "CHUNK_ELEMENTS", rows * C * G)
    kernel, twin, _ = KINDS[kind]
    given = tensors(kind)
    out, expected = kernel(*given, activation), twin(*given, activation)
    close(out, expected)
    weights = torch.randn_like(out)
    for actual, wanted in zip(gradients(out, weights, given), gradients(expected, weights, given), strict=True):
        close(actual, wanted)


@KIND
def test_derivatives_by_finite_differences(kind):
    assert torch.autograd.gradcheck(lambda *given: KINDS[kind][0](*given, "gelu"), tensors(kind))


@KIND
@ACTIVATION
def test_an_input_without_gradient(kind, activation):
    kernel, twin, _ = KINDS[kind]
    x, *weights = tensors(kind)
    x = x.detach()
    actual = torch.autograd.grad(kernel(x, *weights, activation).square().sum(), weights)
    for got, wanted in zip(
        actual, torch.autograd.grad(twin(x, *weights, activation).square().sum(), weights), strict=True
    ):
        close(got, wanted)


def test_a_hand_worked_gate():
    x, w1, b1 = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, -1.0], [0.0, 3.0]]), torch.tensor([0.5, -2.0])
    w2, b2 = torch.tensor([[10.0], [7.0]]), torch.tensor([0.25])
    # Hidden 2 + 0.5 = 2.5 and -2 + 3 - 2 = -1, which relu drops: 10 * 2.5 + 0.25.
    assert vector_gates(x, w1, b1, w2, b2, "relu").item() == 25.25
    assert scalar_gates(x[:, :1], w1[:1].t(), b1[:, None], w2, b2, "relu").item() == 25.25  # hidden 2.5 and -4


@KIND
def test_the_hidden_layer_never_exists_whole(kind, monkeypatch):
    tokens, width, slices, hidden = 512, 8, 16, 8
    monkeypatch.setattr(gates, "CHUNK_ELEMENTS", 4 * slices * hidden)
    shapes = {
        "vector": [(tokens, width), (width, slices * hidden), (slices * hidden,), (hidden, slices), (slices,)],
        "scalar": [(tokens, slices), (hidden, slices), (hidden, slices), (hidden, slices), (slices,)],
    }
    given = [torch.randn(shape).requires_grad_() for shape in shapes[kind]]
    whole = tokens * slices * hidden * 4
    with Watch() as watch:
        KINDS[kind][0](*given, "gelu").sum().backward()
    assert watch.largest <= tokens * slices * 4  # the output is the largest
    assert watch.peak < whole / 2
