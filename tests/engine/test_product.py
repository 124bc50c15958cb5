"""The replacement kernel against one row at a time: values, gradients, chunks, what it keeps."""

from __future__ import annotations

import pytest
import torch
from twins import Watch, close, gradients

from spdcli.engine import product
from spdcli.engine.product import MaskedRows, replaced_product
from spdcli.engine.subcomponents import masked_product

R, T, I, O, C, B = 7, 3, 5, 4, 6, 3
ROWS = [5, 0, 2, 6]  # of 7, in no order


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_row_at_a_time(x, weight, bias, U, V, asked):
    """Every row by itself: the target's product, or masked slices whose mask is worked out by hand."""
    answers = list((x @ weight).unbind(0))
    for number, row in enumerate(asked.rows.tolist()):
        mask = asked.mask[number if asked.origin is None else asked.origin[number]]
        draw = number if asked.draw is None else asked.draw[number]
        if asked.noise is not None:
            mask = mask + (1 - mask) * asked.noise[draw]
        delta = None if asked.delta is None else asked.delta[draw]
        answers[row] = masked_product(
            x[row], weight, U, V, mask[-x.shape[1] :], None if delta is None else delta[-x.shape[1] :]
        )
    return torch.stack(answers) + (0 if bias is None else bias)


def asks(kind, rows=ROWS):
    r = len(rows)
    mask = random(B if "origin" in kind else r, 1 if "fixed" in kind else T, C, seed=1).requires_grad_(
        "fixed" not in kind
    )
    origin = torch.arange(r) % B if "origin" in kind else None
    n, length = 2 if "shared" in kind else r, 1 if "fixed" in kind or "still" in kind else T
    noise = random(n, length, C, seed=2).sigmoid() if "noise" in kind else None
    delta = random(n, length, 1, seed=3) if "delta" in kind else None
    for numbers in (noise, delta):
        if numbers is not None and "ascended" in kind:
            numbers.requires_grad_()
    draw = torch.arange(r).flip(0) % 2 if "shared" in kind else None
    return MaskedRows(torch.tensor(rows, dtype=torch.long), mask, delta, origin, noise, draw)


KINDS = ["plain", "noise", "origin noise", "origin noise delta", "delta", "fixed origin", "fixed delta"]
KINDS += [f"ascended {how}" for how in ("noise", "delta", "origin noise delta", "fixed origin noise delta")]
KINDS += [f"ascended shared {how}" for how in ("noise", "still noise delta", "origin still noise", "still delta")]
KINDS += ["shared noise delta", "shared origin still noise delta"]  # shared, and no gradient


@pytest.mark.parametrize("elements", [1, 2 * T * C, 1000])  # one row a chunk, two, all
@pytest.mark.parametrize("rows", [ROWS, list(range(R)), []], ids=["some", "all", "none"])
@pytest.mark.parametrize("positions", [T, 1])  # all, or the last alone
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_answered_as_they_ask(kind, rows, positions, elements, monkeypatch):
    monkeypatch.setattr(product, "CHUNK_ELEMENTS", elements)
    x, U, V = (random(*s, seed=s[0]).requires_grad_() for s in ((R, positions, I), (I, C), (C, O)))
    weight, bias, asked = random(I, O, seed=8), random(O, seed=9), asks(kind, rows)
    given = (x, weight, bias if "delta" in kind else None, U, V, asked)
    actual, expected = replaced_product(*given), one_row_at_a_time(*given)
    close(actual, expected)
    tensors = (x, U, V, asked.mask, asked.noise, asked.delta)
    leaves = [leaf for leaf in tensors if leaf is not None and leaf.requires_grad and leaf.numel()]
    weights = random(R, positions, O, seed=10)
    wanted = torch.autograd.grad(expected, leaves, weights, allow_unused=True)
    for got, other, leaf in zip(gradients(actual, weights, leaves), wanted, leaves, strict=True):
        close(got, torch.zeros_like(leaf) if other is None else other)


def test_full_masks_are_exactly_the_target():
    x, weight, U, V = random(R, T, I), random(I, O), random(I, C), random(C, O)
    ones = MaskedRows(torch.tensor(ROWS), torch.ones(4, T, C).double(), torch.ones(4, T, 1).double())
    assert torch.equal(replaced_product(x, weight, None, U, V, ones), x @ weight)
    drawn = MaskedRows(ones.rows, random(4, T, C).sigmoid(), ones.delta, noise=torch.ones(4, T, C).double())
    assert torch.equal(replaced_product(x, weight, None, U, V, drawn), x @ weight)  # noise 1 is a mask of 1


@pytest.mark.parametrize("shared", [False, True])
def test_inner_activations_are_all_that_is_kept(shared, monkeypatch):
    """Numbers that all rows share are not spread out over them, and nor is their gradient."""
    rows, positions, slices = 64, 16, 32
    monkeypatch.setattr(product, "CHUNK_ELEMENTS", positions * slices)
    x, U, V = (torch.randn(s).requires_grad_() for s in ((rows, positions, 4), (4, slices), (slices, 4)))
    mask = torch.rand(8, positions, slices).requires_grad_()
    noise = torch.rand(*((1, 1) if shared else (rows, positions)), slices).requires_grad_(shared)
    delta, draw = torch.rand(1, 1, 1).requires_grad_() if shared else None, torch.zeros(rows, dtype=torch.long)
    asked = MaskedRows(torch.arange(rows), mask, delta, torch.arange(rows) % 8, noise, draw if shared else None)
    wide = rows * positions * slices * 4
    with Watch() as watch:
        replaced_product(x, torch.randn(4, 4), None, U, V, asked).sum().backward()
    assert watch.largest == wide
    assert watch.peak < 2 * wide  # a mask, its gradient and a product of their own would each be another
