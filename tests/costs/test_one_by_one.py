"""The benchmark's obvious way of a step computes what the plan pass computes: losses and gradients."""

from __future__ import annotations

import pytest
import torch
from twins import COEFFICIENTS, KeyedNoise, close, decompose, language_subject, looked_at, toy_subject

from spdcli.costs.one_by_one import fit_one_by_one, one_by_one_step, whole_gates
from spdcli.engine import importance
from spdcli.engine.fit import FitSettings, fit, start_fit
from spdcli.engine.forward import clean_pass
from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.optimise import OptimiserSettings
from spdcli.engine.step import backward_step
from spdcli.engine.tables import LOSSES
from spdcli.engine.variants import draw_variants

TOLERANCE = 1e-9  # float64, after some hundred passes of three blocks are summed
OUTPUTS = {name: coefficient for name, coefficient in COEFFICIENTS.items() if LOSSES[name].hidden_of is None}
CASES = [
    ("toy", "attention", "all", {}),
    ("toy", "scalar", "last", {"samples": 2}),
    ("gpt2", "vector", "last", {}),
    ("gpt2", "shared", "all", {"reverse_kl": True, "subset": "position"}),
]


def gradients(decomposition):
    found = {name: p.grad.clone() for name, p in decomposition.named_parameters() if p.grad is not None}
    decomposition.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("whole", [False, True], ids=["kernels", "whole gates"])
@pytest.mark.parametrize(("kind_of_target", "kind", "looked", "options"), CASES)
def test_it_is_the_same_step(kind_of_target, kind, looked, options, whole, tiny_gpt2_dir):
    subject = toy_subject(sequences=2, length=5) if kind_of_target == "toy" else language_subject(tiny_gpt2_dir)
    target, batch = subject.target, looked_at(subject.batch, looked)
    decomposition = decompose(target, kind=kind)
    settings = LossSettings(OUTPUTS, epsilon=1e-6, **options)
    clean = clean_pass(target, batch, decomposition.names)
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    noise = KeyedNoise(len(batch.tokens))
    done = backward_step(target, decomposition, clean, settings, 0.6, draw(), noise, 1e12)
    expected = gradients(decomposition)
    blocks = {name: target.matrices[name].block for name in decomposition.names}
    shape = tuple(batch.tokens.shape)
    variants = draw_variants(settings.reconstruction, blocks, settings.samples, settings.subset, shape, draw())
    noise = KeyedNoise(len(batch.tokens))
    if whole:
        with whole_gates():
            losses = one_by_one_step(target, decomposition, clean, settings, 0.6, variants, noise)
    else:
        losses = one_by_one_step(target, decomposition, clean, settings, 0.6, variants, noise)
    actual = gradients(decomposition)
    assert losses.keys() == done.losses.keys() == OUTPUTS.keys()
    for name, loss in losses.items():
        close(loss, done.losses[name].to(loss.dtype), TOLERANCE)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        close(gradient, expected[name], TOLERANCE)


def test_whole_gates_put_the_kernels_back():
    kernels = importance.vector_gates, importance.scalar_gates
    with whole_gates():
        assert importance.vector_gates is not kernels[0]
        assert importance.scalar_gates is not kernels[1]
    assert (importance.vector_gates, importance.scalar_gates) == kernels


def test_the_loop_trains_as_the_engines_does():
    """One importance variant has no noise, so that both loops go the same way: the same parameters after 3 steps."""
    subject = toy_subject(sequences=2, length=5)
    losses = LossSettings({"recon": 1.0, "minimality": 0.1, "faithfulness": 2.0})
    schedule = OptimiserSettings("adam", 0.01, 0.0, "cosine", 0, 3)
    settings = FitSettings(steps=3, clip_slices=0.1, clip_gates=0.01, losses=losses)
    after = []
    for loop in (fit, fit_one_by_one):
        decomposition = decompose(subject.target)
        state = start_fit(decomposition, schedule, 0, torch.device("cpu"))
        steps = list(loop(subject.target, decomposition, lambda generator, number: subject.batch, state, settings))
        assert len(steps) == 3
        after.append({name: p.detach().clone() for name, p in decomposition.named_parameters()})
    start = dict(decompose(subject.target).named_parameters())
    for name, value in after[0].items():
        close(after[1][name].double(), value.double(), 1e-6)  # Adam divides by the root of rounding
    assert any(not torch.equal(start[name], value) for name, value in after[0].items())
