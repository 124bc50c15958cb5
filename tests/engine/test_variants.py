"""Variants and chunks: counts, weights, order, random subsets, and nothing lost under any budget."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spdcli.engine.losses import RECONSTRUCTION
from spdcli.engine.tables import LOSSES, SCOPES, SOURCES
from spdcli.engine.variants import Drawing, Variant, chunks, draw_variants

BLOCKS = {"h.1.a": 1, "h.1.b": 1, "h.2.a": 2, "h.4.a": 4, "h.4.b": 4}
SHAPE = (3, 4)
# Variants for 5 matrices and 2 samples; importance masks are no sample, so they are drawn once.
SIZES = {"all": 1, "each": 5, "subset": 1}
DRAWING = Drawing("forward", None, SHAPE, torch.Generator())
COUNTS = {
    name: (SIZES.get(LOSSES[name].scope) or len(SCOPES[LOSSES[name].scope].load()(list(BLOCKS), DRAWING)))
    * (2 if SOURCES[LOSSES[name].source].sampled else 1)
    for name in RECONSTRUCTION
    if LOSSES[name].of_outputs
}
HIDDEN = [name for name in RECONSTRUCTION if LOSSES[name].hidden_of]


def draw(wanted=tuple(RECONSTRUCTION), samples=2, subset="forward", shape=SHAPE, seed=0):
    return draw_variants(wanted, BLOCKS, samples, subset, shape, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("subset", ["forward", "position"])
def test_every_loss_gets_its_variants_in_equal_shares(subset):
    variants = draw(subset=subset)
    assert Counter(variant.loss for variant in variants) == COUNTS
    for variant in variants:
        assert variant.weight == pytest.approx(1 / COUNTS[variant.loss])
        assert variant.source == LOSSES[variant.loss].source


def test_a_hidden_loss_looks_into_the_variants_of_its_loss_of_outputs():
    for variant in draw():
        hidden = f"hidden_{variant.loss}"
        assert variant.hidden == (hidden if hidden in HIDDEN else None)
        assert variant.compares_outputs
    assert [v.hidden for v in draw(["recon", "stochastic_recon"])] == [None] * 3


@pytest.mark.parametrize("loss", HIDDEN)
def test_a_hidden_loss_alone_has_the_same_variants_and_compares_no_outputs(loss):
    own, beside = draw([loss], subset="position"), draw([LOSSES[loss].hidden_of], subset="position")
    assert [(v.matrices, v.weight, v.entry, v.source) for v in own] == [
        (v.matrices, v.weight, v.entry, v.source) for v in beside
    ]
    assert {(v.loss, v.hidden, v.compares_outputs) for v in own} == {(loss, loss, False)}
    for one, other in zip(own, beside, strict=True):
        assert (one.routed is None) == (other.routed is None)
        assert all(torch.equal(mask, other.routed[name]) for name, mask in (one.routed or {}).items())


@pytest.mark.parametrize("loss", COUNTS)
def test_a_loss_alone_is_drawn_alone(loss):
    assert {variant.loss for variant in draw([loss])} == {loss}
    assert len(draw([loss], samples=3)) == COUNTS[loss] * (1.5 if SOURCES[LOSSES[loss].source].sampled else 1)


def test_the_papers_grid():
    papers = ("recon", "recon_layerwise", "recon_partial")
    assert [COUNTS[name] for name in papers] == [1, 5, 1]
    assert [COUNTS[f"stochastic_{name}"] for name in papers] == [2, 10, 2]


def test_scopes():
    by_loss = defaultdict(list)
    for variant in draw():
        by_loss[variant.loss].append(variant.matrices)
    for loss in ("recon", "stochastic_recon"):
        assert set(by_loss[loss]) == {frozenset(BLOCKS)}
    for loss, times in (("recon_layerwise", 1), ("stochastic_recon_layerwise", 2)):
        assert Counter(by_loss[loss]) == {frozenset([name]): times for name in BLOCKS}
    for loss in ("recon_partial", "stochastic_recon_partial"):
        assert all(chosen and chosen <= set(BLOCKS) for chosen in by_loss[loss])


def test_layerwise_losses_of_some_matrices():
    """Each matrix as often as any other, in equal shares: the mean over draws is that of all matrices."""
    losses = ["recon_layerwise", "stochastic_recon_layerwise"]
    generator = torch.Generator().manual_seed(0)
    shares = {loss: Counter() for loss in losses}
    for _ in range(2000):
        variants = draw_variants(losses, BLOCKS, 2, "forward", SHAPE, generator, layerwise=2)
        assert Counter(variant.loss for variant in variants) == dict(zip(losses, (2, 4), strict=True))
        for variant in variants:
            (name,) = variant.matrices
            shares[variant.loss][name] += variant.weight / 2000
        first = [variant.matrices for variant in variants if variant.loss == losses[0]]
        assert len(set(first)) == 2  # drawn without putting back
    for loss in losses:
        # A share of a fifth; of 2000 draws its standard error is sqrt(2/5 * 3/5 / 2000) / 2 = 0.0055.
        assert all(shares[loss][name] == pytest.approx(1 / 5, abs=5 * 0.0055) for name in BLOCKS)


def test_more_layerwise_matrices_than_there_are_is_all_of_them():
    both = [
        draw_variants(["recon_layerwise"], BLOCKS, 1, "forward", SHAPE, torch.Generator(), n) for n in (5, 99, None)
    ]
    assert len({tuple(variant.matrices for variant in variants) for variants in both}) == 1


def test_variants_enter_at_their_first_block_in_order():
    variants = draw()
    assert [variant.entry for variant in variants] == sorted(variant.entry for variant in variants)
    assert all(variant.entry == min(BLOCKS[name] for name in variant.matrices) for variant in variants)
    assert {variant.entry for variant in variants} == {1, 2, 4}


def test_only_subsets_a_position_are_routed():
    assert all(variant.routed is None for variant in draw())
    for variant in draw(subset="position"):
        if not variant.loss.endswith("partial"):
            assert variant.routed is None
            continue
        assert set(variant.routed) == set(variant.matrices) == set(BLOCKS)
        assert all(where.shape == SHAPE and where.dtype == torch.bool for where in variant.routed.values())
    # Each sample is routed anew.
    first, second = draw(["stochastic_recon_partial"], subset="position", shape=(20, 20))
    assert any(not torch.equal(first.routed[name], second.routed[name]) for name in BLOCKS)


def frequencies(subset):
    """How often 1 .. 5 of the matrices are chosen, and how often each matrix is, of 4000 draws."""
    if subset == "forward":
        drawn = [variant.matrices for variant in draw(["stochastic_recon_partial"], samples=4000)]
        return Counter(len(chosen) for chosen in drawn), Counter(name for chosen in drawn for name in chosen)
    (variant,) = draw(["recon_partial"], subset="position", shape=(40, 100))
    sizes = torch.stack(list(variant.routed.values())).sum(0).flatten().tolist()
    return Counter(sizes), Counter({name: int(where.sum()) for name, where in variant.routed.items()})


@pytest.mark.parametrize("subset", ["forward", "position"])
def test_subsets_are_of_uniform_size_and_fair(subset):
    sizes, chosen = frequencies(subset)
    assert set(sizes) == {1, 2, 3, 4, 5}
    # 800 of each size, give or take sqrt(4000 / 5 * 4 / 5) = 25; each matrix in 3 of 5 sizes' shares, 2400 +- 31.
    assert all(abs(count - 800) < 5 * 26 for count in sizes.values())
    assert all(abs(chosen[name] - 2400) < 5 * 31 for name in BLOCKS)


def test_positions_choose_apart_from_each_other():
    (variant,) = draw(["recon_partial"], subset="position", shape=(40, 100))
    where = variant.routed["h.2.a"].double()
    here, there = where[:, :-1].flatten(), where[:, 1:].flatten()
    assert abs(torch.corrcoef(torch.stack([here, there]))[0, 1]) < 5 / len(here) ** 0.5


def test_a_plan_follows_its_generator():
    plan = lambda seed: [(v.loss, v.matrices) for v in draw(samples=5, seed=seed)]  # noqa: E731
    assert plan(1) == plan(1)
    assert plan(1) != plan(2)


@st.composite
def plans(draw_from):
    entries = sorted(draw_from(st.lists(st.integers(0, 3), min_size=1, max_size=12)))
    variants = [Variant("recon", "importance", frozenset("m"), entry, 1.0) for entry in entries]
    costs = sorted(draw_from(st.lists(st.floats(0.5, 100), min_size=4, max_size=4)), reverse=True)
    return variants, draw_from(st.integers(1, 6)), costs, draw_from(st.floats(0.1, 2000))


@given(plans())
def test_chunks_hold_every_row_once_in_order_and_fit(plan):
    variants, sequences, costs, budget = plan
    cut = chunks(variants, sequences, costs, budget)
    rows = [(piece.variant, row) for chunk in cut for piece in chunk for row in range(piece.start, piece.stop)]
    assert rows == [(variant, row) for variant in variants for row in range(sequences)]
    for chunk in cut:
        cost = sum(costs[piece.variant.entry] * len(piece) for piece in chunk)
        assert cost <= budget * (1 + 1e-9) or sum(len(piece) for piece in chunk) == 1
        assert all(len(piece) > 0 for piece in chunk)
        for piece in chunk:
            if len(piece) < sequences:
                assert costs[piece.variant.entry] * sequences > budget  # cut only what does not fit whole


def test_chunks_by_hand():
    a, b, c = (Variant("recon", "importance", frozenset("m"), entry, 1.0) for entry in (0, 1, 1))
    sizes = lambda budget: [[len(p) for p in chunk] for chunk in chunks([a, b, c], 4, [10, 5], budget)]  # noqa: E731
    assert sizes(80) == [[4, 4, 4]]  # 40 + 20 + 20
    assert sizes(79) == [[4, 4], [4]]
    assert sizes(40) == [[4], [4, 4]]
    assert sizes(30) == [[3], [1], [4], [4]]
    assert sizes(1) == [[1]] * 12
    assert chunks([], 4, [10, 5], 80) == []


def delta_masks(how, losses=("stochastic_recon", "recon"), delta=None):
    variants = draw_variants(losses, BLOCKS, 3000, "forward", SHAPE, torch.Generator(), delta=delta, delta_masks=how)
    by_loss = defaultdict(list)
    for variant in variants:
        by_loss[variant.loss].append(variant.delta)
    return by_loss


def test_delta_masks_of_a_whole_variant():
    """At the corners a third of draws each, give or take sqrt(3000 * 2 / 9), and in importance-masked losses too."""
    assert delta_masks("position") == {"stochastic_recon": [None] * 3000, "recon": [None]}
    anywhere, corners = delta_masks("forward"), delta_masks("corner")
    assert anywhere["recon"] == [None]
    assert {0.0, 1.0} <= set(delta_masks("corner", ["recon"] * 30)["recon"])
    assert set(delta_masks("corner", ["adversarial_recon"])["adversarial_recon"]) == {None}
    values = torch.tensor(anywhere["stochastic_recon"])
    assert values.min() >= 0
    assert values.max() <= 1
    assert values.mean().item() == pytest.approx(0.5, abs=5 * 12**-0.5 * 3000**-0.5)
    for corner in (0.0, 1.0):
        assert abs(corners["stochastic_recon"].count(corner) - 1000) < 5 * 26
    between = torch.tensor([value for value in corners["stochastic_recon"] if 0 < value < 1])
    assert between.mean().item() == pytest.approx(0.5, abs=5 * 12**-0.5 * 1000**-0.5)


@pytest.mark.parametrize("how", ["forward", "corner"])
def test_a_delta_mask_of_all_variants_is_not_drawn(how):
    assert set(delta_masks(how, delta=1.0)["stochastic_recon"]) == {1.0}
