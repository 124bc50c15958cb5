"""Whether known parts are found: by hand on slices that are the parts, halves of them, or other things."""

from __future__ import annotations

import pytest
import torch

from spdcli.engine.subcomponents import Slices
from spdcli.measures.feature_evaluation import parts_found

W = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]])  # three features, written in two dimensions
ALONE = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.2, 0.05]])


def perfect():
    """A slice a feature, and a small one that does not live and points along the first."""
    U = torch.cat([torch.eye(3), torch.tensor([[0.01], [0.0], [0.0]])], dim=1)
    return Slices(U, torch.cat([W, W[:1]]))


def test_a_slice_a_feature_is_perfect():
    found = parts_found(W, torch.eye(3), perfect(), ALONE)
    assert found.mean_max_cosine == pytest.approx(1)
    assert found.l2_ratio == pytest.approx(1)  # the small slice, which is no farther in direction, does not live
    assert found.own == 3


def test_a_slice_that_does_not_live_is_not_compared():
    """The small one points exactly along the part, the one that lives almost."""
    slices = Slices(torch.tensor([[1.0, 0.01]]), torch.tensor([[4.0, 3.0], [3.0, 4.0]]))
    found = parts_found(W[:1], torch.eye(1), slices, torch.tensor([[1.0, 0.1]]))
    assert found.mean_max_cosine == pytest.approx(24 / 25)
    assert found.l2_ratio == pytest.approx(1)


def test_signs_of_u_and_v_belong_together():
    slices = perfect()
    turned = Slices(-slices.U.detach(), -slices.V.detach())
    assert parts_found(W, torch.eye(3), turned, ALONE).mean_max_cosine == pytest.approx(1)
    one = Slices(slices.U.detach(), -slices.V.detach())
    found = parts_found(W, torch.eye(3), one, ALONE)
    # Only slice c writes anything for feature c, and against it: any other's cosine is 0.
    assert found.mean_max_cosine == pytest.approx(0)


def test_halves_have_the_direction_and_not_the_size():
    halves = Slices(torch.cat([torch.eye(3)] * 2, dim=1), torch.cat([W, W]) / 2)
    found = parts_found(W, torch.eye(3), halves, torch.cat([torch.eye(3)] * 2, dim=1))
    assert found.mean_max_cosine == pytest.approx(1)
    assert found.l2_ratio == pytest.approx(0.5)
    assert found.own == 0  # two slices live on every feature


def test_one_slice_for_two_features():
    U = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    V = torch.tensor([[3.0, 4.0], [-1.0, 0.0]])
    alone = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = parts_found(W, torch.eye(3), Slices(U, V), alone)
    assert found.mean_max_cosine == pytest.approx((1 + 0.8 + 1) / 3)  # (3, 4) on (0, 2) is 4 / 5
    assert found.l2_ratio == pytest.approx((1 + 2.5 + 1) / 3)
    assert found.own == 1


def test_features_that_a_matrix_reads_through_an_embedding():
    read = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    slices = Slices(read.t().clone(), torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    weight = (slices.U @ slices.V).detach()
    found = parts_found(read @ weight, read, slices, torch.eye(2))
    assert found.mean_max_cosine == pytest.approx(1)
    assert found.l2_ratio == pytest.approx(1)


def test_where_no_slice_lives_there_is_nothing_to_compare():
    found = parts_found(W, torch.eye(3), perfect(), torch.full((3, 4), 0.1))
    assert (found.mean_max_cosine, found.l2_ratio, found.own) == (None, None, 0)
