"""What of planted slices is found: values worked out by hand, and what the data cannot see."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace

import pytest
import torch

from spdcli.engine.subcomponents import Slices
from spdcli.measures.slice_recovery import Activity, compared, slice_recovery
from spdcli.recipe.reading import load_recipe
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.planted_subject import planted_subject

EYE = {"A": torch.eye(4, dtype=torch.float64)}


def subject_of(U, V):
    """A subject with one planted matrix, for `compared`, which reads no more of it."""
    slices = Slices(torch.tensor(U, dtype=torch.float32), torch.tensor(V, dtype=torch.float32))
    return SimpleNamespace(planted=SimpleNamespace(slices={"A": slices}))


@pytest.fixture
def two():
    """A matrix with two planted slices: e0 (x) e0 and e1 (x) e1, in four dimensions and three."""
    return subject_of([[1, 0], [0, 1], [0, 0], [0, 0]], [[1, 0, 0], [0, 1, 0]])


def slices(*pairs):
    reads, writes = zip(*pairs, strict=True)
    return {"A": Slices(torch.tensor(reads, dtype=torch.float32).t(), torch.tensor(writes, dtype=torch.float32))}


def test_slices_are_found_whatever_their_order_sign_and_scale(two):
    found = slices(([0, -3, 0, 0], [0, -0.1, 0]), ([0, 0, 0, 1], [0, 0, 1]), ([2, 0, 0, 0], [-5, 0, 0]))
    total = compared(two, found, {"A": [0, 2]}, EYE).total
    assert (total.planted, total.active, total.matches) == (2, 2, 2)
    for value in (total.precision, total.recall, total.cosine, total.weights, total.read, total.write):
        assert value == pytest.approx(1)
    assert total.missing is total.idle is None


def test_a_slice_that_is_turned_by_half_a_right_angle_is_no_match(two):
    found = slices(([1, 0, 0, 0], [1, 0, 0]), ([0, 1, 0, 0], [0, 1, 1]), ([0, 0, 1, 0], [0, 0, 1]))
    total = compared(two, found, {"A": [0, 1, 2]}, EYE).total
    assert (total.active, total.matches) == (3, 1)
    assert total.precision == pytest.approx(1 / 3)
    assert total.recall == pytest.approx(1 / 2)
    assert total.cosine == total.weights == pytest.approx((1 + 0.5**0.5) / 2)
    assert total.read == pytest.approx(1)
    assert total.write == pytest.approx((1 + 0.5**0.5) / 2)


def test_a_planted_slice_without_a_partner_counts_as_nothing(two):
    total = compared(two, slices(([1, 0, 0, 0], [1, 0, 0])), {"A": [0]}, EYE).total
    assert (total.matches, total.precision, total.recall) == (1, 1, 0.5)
    assert total.cosine == total.weights == total.read == total.write == pytest.approx(0.5)
    nothing = compared(two, slices(([1, 0, 0, 0], [1, 0, 0])), {"A": []}, EYE).total
    assert (nothing.precision, nothing.recall, nothing.cosine) == (0, 0, 0)


def test_what_is_read_where_no_input_lies_does_not_count(two):
    inputs = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0]], dtype=torch.float64)
    found = slices(([1, 0, 7, 0], [1, 0, 0]), ([0, 1, 0, -7], [0, 1, 0]))
    total = compared(two, found, {"A": [0, 1]}, {"A": inputs}).total
    assert total.cosine == pytest.approx(1)
    assert total.weights == pytest.approx(50**-0.5)


def test_positions_at_which_slices_are_missing_or_idle(two):
    active = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]]).bool()[None]  # [B, T, C]
    needed = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0]]).bool()[None]
    found = slices(([1, 0, 0, 0], [1, 0, 0]), ([0, 1, 0, 0], [0, 1, 0]), ([0, 0, 1, 0], [0, 0, 1]))
    recovery = compared(two, found, {"A": [0, 1, 2]}, EYE, {"A": Activity.of(active, needed)})
    assert recovery.total == recovery.matrices["A"]
    assert recovery.total.missing == pytest.approx(1 / 3)  # the first slice at position 2
    assert recovery.total.idle == pytest.approx(4 / 6)  # all but the first at 0 and the second at 2


def test_the_assignment_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    U, V = torch.randn(4, 4, generator=generator), torch.randn(4, 3, generator=generator)
    subject = subject_of(U.tolist(), V.tolist())
    found = {"A": Slices(torch.randn(4, 4, generator=generator), torch.randn(4, 3, generator=generator))}
    outer = lambda s: torch.einsum("ic,co->cio", s.U, s.V).flatten(1).double()  # noqa: E731
    unit = lambda rows: rows / rows.norm(dim=1, keepdim=True)  # noqa: E731
    cosines = (unit(outer(subject.planted.slices["A"])) @ unit(outer(found["A"])).t()).abs()
    best = max(sum(cosines[i, j] for i, j in enumerate(order)) for order in permutations(range(4)))
    with torch.no_grad():
        assert compared(subject, found, {"A": [0, 1, 2, 3]}, EYE).total.cosine == pytest.approx(best.item() / 4)


@pytest.mark.parametrize("name", ["planted-induction", "planted-lookup"])
def test_the_planted_slices_themselves_are_found_whole(name):
    recipe = load_recipe(name, ["slices.C=9" if name == "planted-induction" else "slices.C=12"]).recipe
    subject = planted_subject(recipe, torch.device("cpu"))
    decomposition = start_decomposition(recipe, subject, list(subject.target.matrices))
    with torch.no_grad():
        for matrix, planted in subject.planted.slices.items():
            own = decomposition.of(matrix)
            order = torch.randperm(planted.U.shape[1], generator=torch.Generator().manual_seed(1))
            own.U[:, : len(order)], own.V[: len(order)] = planted.U[:, order], planted.V[order]
    recovery = slice_recovery(subject, decomposition, 600, -10.0, 0)  # everything is active
    for matrix, one in recovery.matrices.items():
        assert one.recall == 1, matrix
        assert one.precision == one.planted / recipe.slices.C
        assert one.weights == pytest.approx(1, abs=1e-6)
        assert one.missing == 0
