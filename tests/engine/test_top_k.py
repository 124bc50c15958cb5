"""Attribution-based decomposition: attributions against one gradient an output, masks, objective, training."""

from __future__ import annotations

import pytest
import torch

from spdcli.engine.direct_losses import exact_faithfulness
from spdcli.engine.forward import clean_pass, masked_logits
from spdcli.engine.masks import importance_masks
from spdcli.engine.optimise import OptimiserSettings
from spdcli.engine.subcomponents import SliceSet, start_slices
from spdcli.engine.top_k import TopKSettings, attributions, fit_top_k, top_k_loss, top_k_masks
from spdcli.targets.planted_lookup import PlantedLookupShape, planted_lookup

SETTINGS = TopKSettings(active=2.0, faithfulness=10.0, simplicity=0.01, probes=1)


@pytest.fixture
def planted():
    return planted_lookup(PlantedLookupShape(subjects=4, tokens=7, length=3, d_model=13), 0)


def started(planted, C=5, start="random"):
    return SliceSet(start_slices(planted.target.matrices, C, start, None, 0), delta=False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slow_attributions(planted, slices, batch):
    """One backward an output through a model whose slices have masks of 1 beside the rest of W."""
    matrices = planted.target.matrices
    with torch.enable_grad():
        masks = {name: torch.ones(*batch.tokens.shape, 5, requires_grad=True) for name in matrices}
        hidden = planted.target.model.embed(batch.tokens)
        for block in range(2):
            inner = hidden
            for name in (f"Up{block}", f"Down{block}"):
                matrix, own = matrices[name], slices.of(name)
                x = inner
                inner = x @ (matrix.weight - own.U @ own.V) + ((x @ own.U) * masks[name]) @ own.V
                inner = inner.clamp(min=planted.target.blocks[block].floor) if name.startswith("Up") else inner
            hidden = hidden + inner
        outputs = planted.target.model.unembed(hidden).flatten()
        sums = {name: torch.zeros_like(mask) for name, mask in masks.items()}
        for output in outputs:
            for name, found in zip(
                masks, torch.autograd.grad(output, list(masks.values()), retain_graph=True), strict=True
            ):
                sums[name] += found.square()
    return {name: total.detach() for name, total in sums.items()}


def test_attributions_are_the_squared_gradients_of_all_outputs(planted):
    batch, slices = planted.draw(2, generator()), started(planted)
    clean = clean_pass(planted.target, batch, slices.names)
    exact = slow_attributions(planted, slices, batch)
    estimated = attributions(planted.target, slices, clean, 4000, generator(1))
    for name in exact:
        scale = exact[name].max()
        assert (estimated[name] - exact[name]).abs().max() < 0.1 * scale  # 4 standard errors of 4000 probes
        assert scale > 0


def test_the_largest_attributions_of_the_batch_are_on(planted):
    batch, slices = planted.draw(6, generator()), started(planted)
    clean = clean_pass(planted.target, batch, slices.names)
    masks = top_k_masks(planted.target, slices, clean, SETTINGS, generator(2))
    scores = attributions(planted.target, slices, clean, 1, generator(2))
    assert sum(int(mask.sum()) for mask in masks.values()) == 2 * 6 * 3
    on = torch.cat([scores[name][mask == 1] for name, mask in masks.items()])
    off = torch.cat([scores[name][mask == 0] for name, mask in masks.items()])
    assert on.min() >= off.max()


def test_the_objective_by_hand(planted):
    batch, slices = planted.draw(6, generator()), started(planted)
    clean = clean_pass(planted.target, batch, slices.names)
    masks = top_k_masks(planted.target, slices, clean, SETTINGS, generator(2))
    logits = masked_logits(planted.target, slices, clean, importance_masks(masks, False))
    kl = (clean.log_probs.exp() * (clean.log_probs - logits.log_softmax(-1))).sum(-1).mean()
    simplicity = 0.0
    for name, mask in masks.items():
        for c in range(5):
            rank_one = torch.outer(slices.of(name).U[:, c], slices.of(name).V[c])
            schatten = torch.linalg.svdvals(rank_one)[0] ** 0.9
            simplicity += (mask[..., c].mean() * schatten).item()
    by_hand = kl + 10 * exact_faithfulness(planted.target, slices) + 0.01 * simplicity
    loss = top_k_loss(planted.target, slices, clean, masks, SETTINGS)
    torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in slices.parameters())


def test_training_makes_the_objective_smaller_and_repeats_itself(planted):
    schedule = OptimiserSettings("adam", 0.01, 0.0, "constant", 0, 60)
    batch = planted.draw(64, generator(5))
    clean = clean_pass(planted.target, batch, list(planted.target.matrices))

    def objective(slices):
        masks = top_k_masks(planted.target, slices, clean, SETTINGS, generator(2))
        return top_k_loss(planted.target, slices, clean, masks, SETTINGS).item()

    results = []
    for _ in range(2):
        slices = started(planted)
        before = objective(slices)
        fit_top_k(planted.target, slices, lambda source, step: planted.draw(8, source), SETTINGS, schedule, 0)
        results.append(objective(slices))
    assert results[0] < 0.5 * before
    assert results[0] == results[1]
