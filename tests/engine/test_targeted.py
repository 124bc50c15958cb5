"""Targeted decompositions: the losses on broad text, where the delta stays on, beside those on the prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_runs import model_recipe
from twins import close, decompose, toy_subject

from spdcli.engine.fit import FitSettings, fit, start_fit
from spdcli.engine.forward import clean_pass
from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.masks import Noise
from spdcli.engine.optimise import OptimiserSettings
from spdcli.engine.step import Step, backward_step
from spdcli.engine.target import Batch
from spdcli.runs.settings import fit_settings
from spdcli.runs.subject import language_subject
from spdcli.runs.text_data import stream_batches

CPU = torch.device("cpu")
LOSSES = LossSettings({"recon": 0.5, "stochastic_recon": 2.0, "minimality": 0.1, "faithfulness": 3.0}, epsilon=1e-6)
ATTACKED = replace(LOSSES, coefficients={**LOSSES.coefficients, "adversarial_recon": 1.0})
OPTIMISER = OptimiserSettings("adam", 0.01, 0.0, "constant", 0, 10)


def broad_batch(subject, seed=9):
    tokens = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, tokens >= 0, tokens >= 0)


def test_the_losses_on_broad_text():
    beside = LOSSES.on_stream(0.5)
    assert beside.coefficients["recon"] == 0.25
    assert beside.coefficients["stochastic_recon"] == 1.0
    assert beside.coefficients["minimality"] == 0.05
    assert beside.coefficients["recon_partial"] == 0
    assert "faithfulness" not in beside.coefficients
    assert beside.delta_mask == 1.0
    assert beside.epsilon == LOSSES.epsilon
    assert ATTACKED.on_stream(0.5).reconstruction == beside.reconstruction  # adversaries look at the prompts alone


def one_step(subject, decomposition, stream, targeted):
    """The record of the first of fit's steps and the gradients it left."""
    state = start_fit(decomposition, OPTIMISER, 0, CPU)
    settings = FitSettings(10, losses=LOSSES, targeted=targeted)
    steps = fit(subject.target, decomposition, lambda generator, number: subject.batch, state, settings, stream)
    record = next(steps)
    return record, {n: p.grad.clone() for n, p in decomposition.named_parameters() if p.grad is not None}


def test_a_targeted_step_adds_the_losses_of_both_texts():
    subject = toy_subject()
    broad = broad_batch(subject)
    record, both = one_step(subject, decompose(subject.target), lambda generator, number: broad, 0.5)
    alone, own = one_step(subject, decompose(subject.target), None, 0.0)
    decomposition = decompose(subject.target)
    clean = clean_pass(subject.target, broad, decomposition.names)
    state = start_fit(decomposition, OPTIMISER, 0, CPU)
    # The prompts' step draws its noise first.
    noise = alone_noise(subject, decomposition, state)
    decomposition.zero_grad(set_to_none=True)
    beside = backward_step(
        subject.target, decomposition, clean, LOSSES.on_stream(0.5), 0.9, state.generators["plan"], noise, 1e12
    )
    assert isinstance(beside, Step)
    for name, parameter in decomposition.named_parameters():
        if parameter.grad is not None:
            close(both[name], own[name] + parameter.grad)
    for name, loss in beside.losses.items():
        assert record.losses[f"stream_{name}"] == pytest.approx(loss.item())
    shares = {"recon": 0.25, "stochastic_recon": 1.0, "minimality": 0.05}
    added = sum(share * beside.losses[name].item() for name, share in shares.items())
    assert record.total == pytest.approx(alone.total + added)
    assert record.active == alone.active  # counted on the prompts


def alone_noise(subject, decomposition, state):
    """The noise that is left to a stream after the prompts' own step."""
    noise = Noise(state.generators["noise"])
    clean = clean_pass(subject.target, subject.batch, decomposition.names)
    backward_step(subject.target, decomposition, clean, LOSSES, 0.9, state.generators["plan"], noise, 1e12)
    return noise


def test_slices_that_matter_elsewhere_are_seen_by_the_broad_text_alone():
    """With the delta on and g = 0, a variant is the target without the slices: its KL is the damage of cutting them."""
    subject = toy_subject()
    decomposition = decompose(subject.target)
    with torch.no_grad():
        for parameter in decomposition.importances.gates.parameters():
            parameter.zero_()
        for gate in decomposition.importances.gates.values():
            gate.b2.fill_(-1.0)
    settings = LossSettings({"recon": 1.0}).on_stream(1.0)
    clean = clean_pass(subject.target, broad_batch(subject), decomposition.names)
    found = backward_step(subject.target, decomposition, clean, settings, 0.9, torch.Generator(), None, 1e12)
    expected = []
    for tokens in clean.batch.tokens:
        log_p = subject.logits(tokens[None]).log_softmax(-1)
        kept = {n: m.module.weight.data.clone() for n, m in subject.target.matrices.items()}
        for name, matrix in subject.target.matrices.items():
            taken = decomposition.of(name).U @ decomposition.of(name).V
            matrix.module.weight.data -= taken.detach().t() if matrix.transposed else taken.detach()
        log_q = subject.logits(tokens[None]).log_softmax(-1)
        for name, matrix in subject.target.matrices.items():
            matrix.module.weight.data = kept[name]
        expected.append((log_p.exp() * (log_p - log_q)).sum(-1))
    close(found.losses["recon"], torch.cat(expected).mean())
    assert found.losses["recon"] > 1e-3


SETTINGS = [
    "data.stream=generated",
    "data.stream_sequences=12",
    "data.stream_length=5",
    "slices.delta=true",
    "losses.targeted=0.5",
    "decompose.stream_batch=3",
]


def test_the_stream_of_a_targeted_recipe(tiny_llama_dir, tmp_path):
    recipe = model_recipe(tiny_llama_dir, *SETTINGS, folder=tmp_path)
    subject = language_subject(recipe, CPU)
    draw = stream_batches(recipe, subject)
    a, again, other = (draw(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert a.tokens.shape == (3, 5)
    assert torch.equal(a.tokens, again.tokens)
    assert not torch.equal(a.tokens, other.tokens)
    whole = {tuple(row) for row in subject.stream().tokens.tolist()}
    assert {tuple(row) for row in a.tokens.tolist()} <= whole
    assert fit_settings(recipe).targeted == 0.5
    plain = model_recipe(tiny_llama_dir, *SETTINGS[:4], folder=tmp_path)
    assert stream_batches(plain, language_subject(plain, CPU)) is None
