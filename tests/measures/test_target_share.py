"""How far slices lie along the weights: by hand, on parts of the target, and on slices that write something new."""

from __future__ import annotations

import pytest
import torch
from twins import close, language_subject

from spdcli.engine.forward import clean_pass
from spdcli.engine.subcomponents import Slices, SliceSet, start_slices
from spdcli.measures.target_share import MatrixShare, output_shares, target_share, weight_shares

NAMES = ["layers.0.mlp.up_proj", "layers.2.mlp.down_proj"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_shares_by_hand():
    weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # What W has along e1 e1ᵀ is 2: a slice of size 2 is all W's, one of size 4 half; e1 e2ᵀ is not in W at all.
    U = torch.tensor([[1.0, 2.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    V = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert weight_shares(weight, U, V).tolist() == [1.0, 0.5, 0.0, 0.0, 0.0]
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    g = torch.tensor([[1.0, 0, 0, 0, 0], [0.5, 0, 0, 0, 0], [0.0, 0, 0, 1.0, 0]], dtype=torch.float64)
    # x W = (2, 1) and the slice writes (2, 0): cos² = 4/5. (2, 0) and (1, 0) agree; (2, 0) and (-2, 0) point apart.
    close(output_shares(x, weight, U, V, g), torch.tensor([0.8, 1.0, 0.0], dtype=torch.float64))


def test_singular_triples_are_the_targets_own():
    weight = random(5, 7)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    close(weight_shares(weight, left * values, right), torch.ones(5, dtype=torch.float64))
    assert (weight_shares(weight, random(5, 4, seed=1), random(4, 7, seed=2)) < 0.6).all()


@pytest.fixture
def target_and_clean(tiny_llama_dir):
    subject = language_subject(tiny_llama_dir)
    clean = clean_pass(subject.target, subject.batch, NAMES)
    return subject.target, clean


def importances(clean, slices, places):
    """All 0 but 1 at `places`: (matrix, sequence, position, slice)."""
    g = {n: torch.zeros(*clean.batch.tokens.shape, slices.of(n).U.shape[1]).double() for n in NAMES}
    for name, b, t, c in places:
        g[name][b, t, c] = 1.0
    return g


def test_dual_slices_write_what_the_target_writes_and_new_ones_do_not(target_and_clean):
    target, clean = target_and_clean
    data = {n: clean.inputs[n][clean.batch.valid] for n in NAMES}
    matrices = {n: target.matrices[n] for n in NAMES}
    duals = SliceSet(start_slices(matrices, 16, "dual", data, 0), delta=True)
    row = int(clean.batch.valid[0].sum()) + 1  # of the second sequence's second token, prompts one after the other
    places = [(NAMES[0], 0, 2, 2), (NAMES[0], 1, 1, row), (NAMES[1], 0, 0, 0)]
    share = target_share(target, duals, clean, importances(clean, duals, places), 0.0)
    assert share.in_outputs == pytest.approx(1.0)
    assert share.blocks == {0: 2, 2: 1}
    assert share.last_block == pytest.approx(1 / 3)
    assert share.by_matrix[NAMES[0]].active == 2
    expected = []
    for name, _, _, c in places:
        u, v = duals.of(name).U[:, c], duals.of(name).V[c]
        inner = u @ target.matrices[name].weight @ v / (u.norm() * v.norm())
        expected.append(min(1.0, max(0.0, (inner / (u.norm() * v.norm())).item())))
    assert share.in_weights == pytest.approx(sum(expected) / 3)
    new = {n: Slices(duals.of(n).U.detach(), random(16, target.matrices[n].d_out, seed=4)) for n in NAMES}
    cheating = target_share(target, SliceSet(new, delta=True), clean, importances(clean, duals, places), 0.0)
    assert cheating.in_outputs < 0.3
    assert cheating.in_weights < 0.5 * share.in_weights


def test_padding_and_the_threshold_do_not_count(target_and_clean):
    target, clean = target_and_clean
    data = {n: clean.inputs[n][clean.batch.valid] for n in NAMES}
    duals = SliceSet(start_slices({n: target.matrices[n] for n in NAMES}, 16, "dual", data, 0), delta=True)
    assert not clean.batch.valid[1, 5]
    g = importances(clean, duals, [(NAMES[0], 1, 5, 3)])
    g[NAMES[1]][0, 0, 0] = 0.2
    share = target_share(target, duals, clean, g, 0.3)
    assert share.in_weights is None
    assert share.in_outputs is None
    assert share.last_block is None
    assert share.by_matrix[NAMES[1]] == MatrixShare(0, None, None)
    assert target_share(target, duals, clean, g, 0.1).last_block == 1.0
