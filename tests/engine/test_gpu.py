"""On a GPU: the same losses and gradients as on the processor, and no step that waits. Without one, skipped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_runs import loud_toy, model_recipe, toy_recipe
from twins import gradients

from spdcli.engine.attention import importance_attention
from spdcli.engine.fit import fit, start_fit
from spdcli.engine.forward import clean_pass
from spdcli.engine.masks import Noise
from spdcli.engine.step import backward_step
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.settings import fit_settings, optimiser_settings
from spdcli.runs.subject import open_subject, toy_subject

CPU, GPU = torch.device("cpu"), torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
KINDS = {
    "scalar": (),
    "vector": (),
    "shared": (),
    "attention": ("importance.relative=query",),
    "attention, blocked": ("importance.backend=blocked",),
    "cheaper": ("losses.layerwise_matrices=2", "losses.faithfulness_probes=3", "losses.subset=position"),
}


class Halves(Noise):
    """Masks halfway to 1, the same on every device."""

    def __init__(self) -> None:
        super().__init__(torch.Generator())

    def __call__(self, out, piece, name, kind):
        out.fill_(0.5)


def recipe_of(kind, folder):
    chosen = "vector" if kind == "cheaper" else kind.partition(",")[0]
    return toy_recipe(f"importance.kind={chosen}", *KINDS[kind], folder=folder)


def a_step(recipe, subject):
    decomposition = start_decomposition(recipe, subject, list(subject.target.matrices))
    settings, generator = fit_settings(recipe), torch.Generator().manual_seed(0)
    clean = clean_pass(subject.target, subject.batches(generator), decomposition.names)
    done = backward_step(
        subject.target, decomposition, clean, settings.losses, 0.5, generator, Halves(), settings.plan_bytes
    )
    found = {f"loss {name}": loss for name, loss in done.losses.items()}
    found |= {name: p.grad for name, p in decomposition.named_parameters() if p.grad is not None}
    return {name: value.cpu() for name, value in found.items()}


def agree(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_the_toy_is_the_processors(kind, tmp_path):
    recipe = recipe_of(kind, tmp_path)
    agree(*(a_step(recipe, toy_subject(recipe, loud_toy(recipe).to(device))) for device in (GPU, CPU)))


def test_a_step_of_a_language_model_is_the_processors(tiny_gpt2_dir, tmp_path):
    recipe = model_recipe(tiny_gpt2_dir, folder=tmp_path)
    agree(*(a_step(recipe, open_subject(recipe, device)) for device in (GPU, CPU)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits(kind, tmp_path):
    recipe = recipe_of(kind, tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe).to(GPU))
    decomposition = start_decomposition(recipe, subject, list(subject.target.matrices))
    state = start_fit(decomposition, optimiser_settings(recipe.decompose), recipe.seed, GPU)
    settings = replace(fit_settings(recipe), log_every=100)
    steps = fit(subject.target, decomposition, subject.batches, state, settings)
    next(steps)  # the first one is recorded, and so is waited for
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["blocked", "flex"])
def test_attention_is_the_reference(backend, causal):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 300, 16)] * 3 + [(2, 2 * 300 - 1)]
    given = [torch.randn(shape, generator=generator).to(GPU).requires_grad_() for shape in shapes]
    valid = (torch.arange(300) < torch.tensor([[300], [120], [250]])).to(GPU)
    weights = torch.randn(shapes[0], generator=generator).to(GPU)
    ours, wanted = (importance_attention(*given, causal, name, valid) for name in (backend, "dense"))
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(gradients(ours, weights, given), gradients(wanted, weights, given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
