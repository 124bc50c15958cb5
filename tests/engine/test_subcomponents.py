"""Masked products and the starts of U and V against explicit matrices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from twins import close, gradients

from spdcli.engine.part_tables import STARTS
from spdcli.engine.subcomponents import (
    distinct_rows,
    dual_directions,
    fitting_rows,
    masked_product,
    start_slices,
)
from spdcli.engine.target import Matrix
from spdcli.errors import SpdError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(slices=4):
    """x, W, U, V, mask and delta mask: 2 sequences of 3 positions, 5 in, 7 out."""
    shapes = [(2, 3, 5), (5, 7), (5, slices), (slices, 7), (2, 3, slices), (2, 3, 1)]
    return [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("with_delta", [True, False])
def test_masked_product_is_the_formed_matrix(with_delta):
    x, weight, U, V, mask, delta = given = parts()
    formed = torch.einsum("ic,btc,co->btio", U, mask, V)
    if with_delta:
        formed = formed + delta[..., None] * (weight - U @ V)
    expected = torch.einsum("bti,btio->bto", x, formed)
    actual = masked_product(x, weight, U, V, mask, delta if with_delta else None)
    close(actual, expected)
    leaves = given if with_delta else [x, U, V, mask]
    weights = random(2, 3, 7, seed=9)
    for a, b in zip(gradients(actual, weights, leaves), gradients(expected, weights, leaves), strict=True):
        close(a, b)


def test_full_masks_are_exactly_the_target():
    x, weight, U, V, mask, delta = parts()
    out = masked_product(x, weight, U, V, torch.ones_like(mask), torch.ones_like(delta))
    assert torch.equal(out, x @ weight)


def test_a_hand_worked_product():
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    U, V = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0, 0.0]])
    # x U V = [6, 0] and x (W - U V) = [1 - 6, 2]: half of the first and a tenth of the second.
    out = masked_product(x, weight, U, V, torch.tensor([[0.5]]), torch.tensor([[0.1]]))
    torch.testing.assert_close(out, torch.tensor([[2.5, 0.2]]))


def broad(size=6, seed=12):
    """A second moment, not near a multiple of 1."""
    drawn = random(40, size, seed=seed) * torch.arange(1.0, size + 1).double()
    return drawn.t() @ drawn / 40


def started(start, slices, shape=(6, 9), inputs=None, dtype=torch.float64, moment=None):
    module = nn.Linear(*shape, bias=False)
    module.weight.data = random(shape[1], shape[0], seed=3).to(dtype)
    matrix = Matrix("m", module, 0, (0, shape[1]), transposed=True)
    data = None if inputs is None else {"m": inputs}
    moments = {"m": broad(shape[0]) if moment is None else moment}
    made = start_slices({"m": matrix}, slices, start, data, 4, moments)["m"]
    assert made.U.shape == (shape[0], slices)
    assert made.V.shape == (slices, shape[1])
    return matrix.weight.detach(), made.U.detach(), made.V.detach()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("slices", [6, 8, 20])
def test_svd_start_is_the_target_when_there_are_enough_slices(slices, shape):
    weight, U, V = started("svd", slices, shape)
    close(U @ V, weight)
    assert (V[6:] == 0).all()  # spare slices write nothing,
    assert (U[:, 6:].norm(dim=0) > 0.1).all()  # but read something, or no gradient would ever reach them


@pytest.mark.parametrize("slices", [1, 4])
def test_svd_start_is_the_best_of_its_rank(slices):
    weight, U, V = started("svd", slices)
    lost = torch.linalg.svdvals(weight)[slices:].square().sum()  # Eckart and Young: no better one of this rank
    close((weight - U @ V).square().sum(), lost)
    close(U.norm(dim=0), V.norm(dim=1))


def test_svd_span_start_is_the_target_on_the_data():
    data = random(10, 3, seed=5) @ random(3, 6, seed=6)
    weight, U, V = started("svd_span", 3, inputs=data)
    close(data @ U @ V, data @ weight)
    outside = random(1, 6, seed=7)
    outside -= outside @ torch.linalg.pinv(data) @ data
    assert (outside @ U @ V).norm() < 1e-10 * (outside @ weight).norm()  # what the data never shows is not read
    weight, U, V = started("svd_span", 5, inputs=data)
    close(data @ U @ V, data @ weight)
    assert (V[3:] == 0).all()


@pytest.mark.parametrize("slices", [1, 4])
def test_svd_text_start_is_the_best_of_its_rank_on_the_text(slices):
    text = random(200, 6, seed=5) @ torch.diag(torch.tensor([9.0, 5, 2, 1, 0.5, 0.1], dtype=torch.float64))
    weight, U, V = started("svd_text", slices, moment=text.t() @ text / len(text))
    lost = torch.linalg.svdvals(text @ weight)[slices:].square().sum()  # Eckart and Young, of what it writes there
    close((text @ (weight - U @ V)).square().sum(), lost, 1e-9)
    close(U.norm(dim=0), V.norm(dim=1))
    if slices == 4:
        _, other_U, other_V = started("svd", slices)
        assert (text @ (weight - other_U @ other_V)).square().sum() > 1.5 * lost


@pytest.mark.parametrize("slices", [3, 5, 8])
def test_a_start_at_inputs_reads_some_of_them_and_writes_what_the_matrix_makes_of_them(slices):
    data = random(5, 6, seed=5) * torch.arange(1.0, 6.0)[:, None]
    nothing = torch.zeros(2, 6, dtype=torch.float64)
    weight, U, V = started("inputs", slices, inputs=torch.cat([nothing, data]))
    close((data @ U @ V).norm(), (data @ weight).norm())
    some = min(slices, 5)
    rows = torch.nn.functional.normalize(data, dim=1)
    cosines = rows @ torch.nn.functional.normalize(U[:, :some], dim=0)
    close(cosines.max(0).values, torch.ones(some).double())
    assert len(set(cosines.argmax(0).tolist())) == some  # no input twice
    close(U[:, :some].norm(dim=0), V[:some].norm(dim=1))
    kept = U[:, :some] / U[:, :some].norm(dim=0)
    scale = (U[:, :some].norm(dim=0) ** 2 / (kept.t() @ weight).norm(dim=1)).mean()
    close(U[:, :some] @ V[:some], scale * kept @ kept.t() @ weight)
    assert (V[some:] == 0).all()
    assert (U[:, some:].norm(dim=0) > 0.1).all()


def test_a_start_at_inputs_of_which_the_matrix_makes_nothing_is_random():
    _, U, V = started("inputs", 4, inputs=torch.zeros(3, 6, dtype=torch.float64))
    _, other_U, other_V = started("random", 4)
    assert torch.equal(U, other_U)
    assert torch.equal(V, other_V)


@pytest.mark.parametrize("start", ["inputs", "svd_span", "dual", "dual_whitened"])
def test_a_start_that_needs_the_data_says_so(start):
    with pytest.raises(ValueError, match="inputs"):
        started(start, 3)


@pytest.mark.parametrize("start", ["dual", "dual_whitened"])
def test_a_dual_slice_is_its_own_tokens_share_of_the_target(start):
    data = random(4, 6, seed=5)
    weight, U, V = started(start, 7, inputs=data)
    answers = data @ U  # [token, slice]
    close(answers[:, :4], torch.diag(answers[:, :4].diagonal()))  # others read as 0
    for token in range(4):
        close(answers[token, token] * V[token], data[token] @ weight)
    assert (V[4:] == 0).all()
    assert (U[:, 4:].norm(dim=0) > 0.1).all()
    close(U[:, :4].norm(dim=0), V[:4].norm(dim=1))


def test_dual_reads_are_the_rows_of_the_pseudo_inverse():
    data = random(4, 6, seed=5)
    _, U, _ = started("dual", 4, inputs=data)
    reads = U / (data @ U).diagonal()
    close(reads, data.t() @ torch.linalg.inv(data @ data.t()))


def test_whitened_reads_answer_least_to_broad_text():
    data, moment = random(3, 6, seed=5), broad()
    reads = dual_directions(data, moment)
    close(data @ reads, torch.eye(3, dtype=torch.float64))
    inverse = torch.linalg.inv(moment)
    close(reads, inverse @ data.t() @ torch.linalg.inv(data @ inverse @ data.t()))
    free = torch.linalg.qr(data.t(), mode="complete")[0][:, 3:]  # directions that the data does not show
    for seed in range(5):
        other = reads + 0.1 * free @ random(3, 3, seed=seed)
        close(data @ other, torch.eye(3, dtype=torch.float64))
        assert (other.t() @ moment @ other).trace() > (reads.t() @ moment @ reads).trace()
    close(dual_directions(data, 3 * torch.eye(6).double()), dual_directions(data))  # nothing to whiten by


def test_prompts_that_begin_alike_share_their_dual_slices():
    data = random(4, 6, seed=5)
    repeated = torch.cat([data[:2], data, data[:1] * (1 + 1e-5)])
    close(distinct_rows(repeated), data)
    for one, other in zip(started("dual", 6, inputs=repeated)[1:], started("dual", 6, inputs=data)[1:], strict=True):
        close(one, other)


def test_a_dual_start_without_room_is_refused():
    with pytest.raises(SpdError, match="each of the data's 5 distinct inputs; there is room for 4"):
        started("dual", 4, inputs=random(5, 6, seed=5))
    with pytest.raises(SpdError, match="each of the data's 7 distinct inputs; there is room for 6"):
        started("dual", 20, inputs=random(7, 6, seed=5))


def test_a_whitened_dual_needs_a_second_moment():
    matrix = Matrix("m", nn.Linear(6, 9, bias=False), 0, (0, 9), transposed=True)
    with pytest.raises(ValueError, match="second moment"):
        start_slices({"m": matrix}, 8, "dual_whitened", {"m": torch.randn(3, 6)}, 0)


@pytest.mark.parametrize("slices", [1, 4, 20])
def test_random_start_has_the_norm_of_the_target(slices):
    weight, U, V = started("random", slices)
    close((U @ V).norm(), weight.norm())


@pytest.mark.parametrize("start", sorted(STARTS))
def test_half_precision_starts_near_the_same_place_in_float32(start):
    data = random(4 if start.startswith("dual") else 10, 6, seed=5)
    _, U, V = started(start, 6, inputs=data)
    weight, rough_U, rough_V = started(start, 6, inputs=data.bfloat16(), dtype=torch.bfloat16)
    assert weight.dtype == rough_U.dtype == rough_V.dtype == torch.float32
    if start != "random":  # drawn numbers differ by dtype; 8 bits each, sums of six products, an inverse
        close(rough_U.double() @ rough_V.double(), U @ V, 0.05 if start == "dual_whitened" else 0.02)


@pytest.mark.parametrize("start", sorted(STARTS))
def test_a_start_is_seeded(start):
    data = random(6, 6, seed=5)
    first, second = (started(start, 8, inputs=data) for _ in range(2))
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


def test_inputs_are_taken_together_until_they_fit():
    """Three directions, each with a neighbour 0.12, 0.32 and 0.52 of a norm away: six rows, of which room decides."""
    axes = torch.eye(8, dtype=torch.float64)[:6]
    near = torch.stack([axes[k] + step * axes[k + 3] for k, step in enumerate((0.12, 0.32, 0.52))])
    rows = torch.cat([axes[:3], near])
    assert len(fitting_rows(rows, 1e-3, None, 4)) == 6
    for fill, kept in ((1.0, 6), (0.9, 5), (0.7, 4), (0.5, 3)):
        fitting = fitting_rows(rows, 1e-3, fill, 6)
        assert len(fitting) == kept
        torch.testing.assert_close(fitting[:3], axes[:3])
    assert len(fitting_rows(rows, 0.4, 0.9, 6)) == 4  # no less than was asked for


def test_a_dual_start_with_room_for_fewer_inputs_needs_fill():
    matrix = SimpleNamespace(weight=torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    inputs = torch.eye(6).repeat_interleave(2, 0) + 0.04 * torch.randn(
        12, 6, generator=torch.Generator().manual_seed(1)
    )
    with pytest.raises(SpdError, match="12 distinct inputs; there is room for 6"):
        start_slices({"m": matrix}, 8, "dual", {"m": inputs}, 0)
    slices = start_slices({"m": matrix}, 8, "dual", {"m": inputs}, 0, fill=1.0)["m"]
    assert int(slices.V.any(1).sum()) == 6
    torch.testing.assert_close(inputs[::2] @ slices.U @ slices.V, inputs[::2] @ matrix.weight, rtol=1e-3, atol=1e-4)
