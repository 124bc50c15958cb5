"""The attention-pattern loss, against patterns of the masked model taken one by one."""

from __future__ import annotations

import pytest
import torch

from spdcli.engine.forward import clean_pass
from spdcli.engine.importance import Importances, ImportanceSettings
from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.masks import Noise, importance_masks
from spdcli.engine.replacement import replaced
from spdcli.engine.step import backward_step
from spdcli.engine.subcomponents import Decomposition, start_slices
from spdcli.errors import RecipeError
from spdcli.recipe.reading import load_recipe
from spdcli.targets.induction import InductionToy, ToyShape, recorded_patterns, toy_target
from spdcli.targets.sequences import InductionSequences


@pytest.fixture
def setting():
    torch.manual_seed(0)
    toy = InductionToy(ToyShape(d_model=8, vocabulary=6, length=9, heads=2)).double()
    target = toy_target(toy)
    slices = start_slices(target.matrices, 5, "random", None, 0)
    counts = dict.fromkeys(target.matrices, 5)
    importances = Importances(dict.fromkeys(counts, 8), counts, ImportanceSettings("vector", 4))
    decomposition = Decomposition(slices, importances, delta=False).double()
    return toy, target, decomposition, InductionSequences(9, 6).draw(4, torch.Generator().manual_seed(1))


def gradients(setting, coefficients):
    _, target, decomposition, batch = setting
    decomposition.zero_grad(set_to_none=True)
    clean = clean_pass(target, batch, decomposition.names, patterns=True)
    generator = torch.Generator().manual_seed(2)
    done = backward_step(
        target, decomposition, clean, LossSettings(coefficients), 0.9, generator, Noise(generator), 1e9
    )
    grads = {n: p.grad for n, p in decomposition.named_parameters() if p.grad is not None}
    return done.losses, grads


def test_value_and_gradients_equal_the_masked_model_run_alone(setting):
    # The coefficient of recon only makes its variant run: 1e-30 of its gradient is lost in rounding.
    losses, grads = gradients(setting, {"recon": 1e-30, "attention": 0.7})
    toy, target, decomposition, batch = setting
    decomposition.zero_grad(set_to_none=True)
    g, _ = decomposition.importance(clean_pass(target, batch, decomposition.names).inputs)
    with recorded_patterns(toy) as original:
        toy.stream(batch.tokens)
    with replaced(target, decomposition, importance_masks(g, False)), recorded_patterns(toy) as masked:
        toy.stream(batch.tokens)
    pairs = [(p.exp(), p, q) for p, q in zip(original, masked, strict=True)]
    kls = [torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).mean() for p, log_p, log_q in pairs]
    expected = torch.stack(kls).mean()
    torch.testing.assert_close(losses["attention"], expected.detach(), rtol=1e-9, atol=0)
    (0.7 * expected).backward()
    compared = 0
    for name, parameter in decomposition.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-7, atol=1e-12)
            compared += bool(parameter.grad.any())
    assert compared > 10


def test_a_budget_of_one_row_changes_nothing(setting):
    _, target, decomposition, batch = setting
    clean = clean_pass(target, batch, decomposition.names, patterns=True)
    settings = LossSettings({"recon": 1.0, "recon_layerwise": 1.0, "attention": 1.0})
    found = []
    for budget in (1e9, 1.0):
        generator = torch.Generator().manual_seed(2)
        done = backward_step(target, decomposition, clean, settings, 0.9, generator, Noise(generator), budget)
        found.append(done.losses["attention"])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("gpt2", ["losses.attention=1"]),
        ("induction", ["losses.attention=1", "losses.recon=0", "losses.stochastic_recon=0"]),
    ],
)
def test_a_recipe_that_cannot_have_it_is_refused(recipe, overrides):
    with pytest.raises(RecipeError, match="attention"):
        load_recipe(recipe, overrides)
