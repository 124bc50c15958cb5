"""Every loss by hand, and the KL through the unembedding against plain autograd."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional as F
from twins import Watch, close, gradients

from spdcli.engine.losses import annealed_p, faithfulness, minimality, probed_faithfulness, unembed_kl


def test_faithfulness_by_hand():
    first = (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 2.0]]))
    second = (torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0, 1.0, 1.0]]))
    # 3² + 4² of four weights and 1² of three.
    assert faithfulness({"a": first, "b": second}).item() == pytest.approx(26 / 7)


def random_pairs():
    generator = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    sizes = {"wide": (4, 7, 3), "tall": (5, 2, 6)}
    return {
        name: (make(i, o), make(i, c).requires_grad_(), make(c, o).requires_grad_())
        for name, (i, o, c) in sizes.items()
    }


def test_faithfulness_and_its_gradient_against_autograd():
    pairs = random_pairs()
    leaves = [leaf for _, U, V in pairs.values() for leaf in (U, V)]
    errors = [(weight - U @ V).square().flatten() for weight, U, V in pairs.values()]
    expected, actual = torch.cat(errors).mean(), faithfulness(pairs)
    close(actual, expected)
    weight = torch.tensor(1.7, dtype=torch.float64)
    for a, b in zip(gradients(actual, weight, leaves), gradients(expected, weight, leaves), strict=True):
        close(a, b)


def test_probes_are_unbiased():
    """The mean over every sign vector there is, which is what random ones expect, is the exact value and gradient."""
    pairs = random_pairs()
    leaves = [leaf for _, U, V in pairs.values() for leaf in (U, V)]
    everyone = {
        name: torch.tensor(list(product((-1.0, 1.0), repeat=len(weight))), dtype=torch.float64)
        for name, (weight, _, _) in pairs.items()
    }
    exact, mean = faithfulness(pairs), probed_faithfulness(pairs, everyone)
    close(mean, exact)
    one = torch.ones((), dtype=torch.float64)
    for a, b in zip(gradients(mean, one, leaves), gradients(exact, one, leaves), strict=True):
        close(a, b)
    few = probed_faithfulness(pairs, {name: signs[:2] for name, signs in everyone.items()})
    assert abs(few - exact) > 0.01 * exact  # some alone are not


def test_minimality_by_hand():
    g = {
        "a": torch.tensor([[[0.25, 1.0], [4.0, 0.0], [100.0, 100.0]]]),
        "b": torch.tensor([[[0.0], [0.09], [100.0]]]),
    }
    valid = torch.tensor([[True, True, False]])
    # Square roots: 0.5 + 1 + 0 at the first position, 2 + 0 + 0.3 at the second; the third is padding.
    assert minimality(g, valid, 0.5, 0.0).item() == pytest.approx((1.5 + 2.3) / 2)
    # epsilon counts inside the power, and not by itself: (0.21 + 0.04) ** 0.5 - 0.04 ** 0.5 = 0.3.
    everywhere = torch.ones(1, 1, dtype=torch.bool)
    assert minimality({"a": torch.tensor([[[0.21]]])}, everywhere, 0.5, 0.04) == pytest.approx(0.3)
    assert minimality({"a": torch.zeros(1, 1, 3)}, everywhere, 0.1, 1e-12) == 0


@pytest.mark.parametrize(("step", "p"), [(0, 0.9), (50, 0.5), (100, 0.1)])
def test_p_falls_in_a_line_from_the_first_step_to_the_last(step, p):
    assert annealed_p(step, 101, 0.9, 0.1) == pytest.approx(p)


def test_p_of_a_single_step_is_where_it_starts():
    assert annealed_p(0, 1, 0.9, 0.1) == 0.9


def ends(rows=7, width=4, vocabulary=11, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, clean = make(rows, width) * scale, make(5, width) * scale
    unembedding, bias = make(vocabulary, width), make(vocabulary)
    return [t.to(dtype) for t in (hidden, clean, unembedding, bias)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 7, 50])  # rows a chunk, of 7
def test_unembed_kl_is_the_kl_of_two_softmaxes(rows, with_bias, reverse):
    hidden, clean, unembedding, bias = ends()
    bias = bias if with_bias else None
    log_p = F.linear(clean, unembedding, bias).log_softmax(-1)
    index = torch.tensor([4, 0, 2, 2, 1, 3, 0])
    hidden.requires_grad_()
    actual = unembed_kl(hidden, unembedding, bias, log_p, index, reverse, chunk_elements=rows * 11 + 1)
    log_q = F.linear(hidden, unembedding, bias).log_softmax(-1)
    pair = (log_p[index], log_q) if reverse else (log_q, log_p[index])
    expected = F.kl_div(*pair, reduction="none", log_target=True).sum(-1)
    close(actual, expected)
    weights = torch.randn(7, dtype=torch.float64)
    close(*gradients(actual, weights, [hidden]), *gradients(expected, weights, [hidden]))


def test_kl_by_hand():
    # Target (1/2, 1/2), variant (3/4, 1/4).
    hidden, unembedding = torch.tensor([[3.0]]).log(), torch.tensor([[1.0], [0.0]])
    half = torch.full((1, 2), 0.5).log()
    at = torch.tensor([0])
    assert unembed_kl(hidden, unembedding, None, half, at).item() == pytest.approx(0.143841, rel=1e-5)  # ln(2/√3)
    reverse = unembed_kl(hidden, unembedding, None, half, at, reverse=True).item()
    assert reverse == pytest.approx(0.130812, rel=1e-5)  # 3/4 ln(3/2) + 1/4 ln(1/2)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_of_equals_is_exactly_zero(dtype, reverse):
    hidden, _, unembedding, bias = ends(dtype=dtype)
    log_p = (hidden @ unembedding.t() + bias).log_softmax(-1)
    assert (unembed_kl(hidden, unembedding, bias, log_p, torch.arange(7), reverse) == 0).all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-5, 1e-3, 1.0, 30.0])
def test_kl_is_never_negative_and_finite(size, dtype, reverse):
    hidden, _, unembedding, bias = ends(rows=50, vocabulary=300, dtype=dtype, scale=5.0)
    log_p = (hidden @ unembedding.t() + bias).log_softmax(-1)
    moved = hidden + size * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    divergence = unembed_kl(moved, unembedding, bias, log_p, torch.arange(50), reverse)
    assert divergence.isfinite().all()
    assert divergence.min() >= -1e-12


@pytest.mark.parametrize("reverse", [False, True])
def test_a_tiny_kl_survives_float32(reverse):
    """The log-probabilities themselves carry errors of 1e-6: a plain sum of p (log p - log q) would be noise."""
    hidden, _, unembedding, bias = ends(rows=20, width=16, vocabulary=2000, dtype=torch.float32)
    moved = hidden + 1e-4 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    answers = []
    for dtype in (torch.float32, torch.float64):
        h, m, weight, b = (t.to(dtype) for t in (hidden, moved, unembedding, bias))
        log_p = F.linear(h, weight, b).log_softmax(-1)
        answers.append(unembed_kl(m, weight, b, log_p, torch.arange(20), reverse).double())
    assert 1e-8 < answers[1].mean() < 1e-6
    # Log-probabilities differ by 4e-4 and are off by 1e-6: what is left is their product, and more where p is large.
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-3, atol=1e-9)


def test_logits_exist_for_a_chunk_of_rows_only():
    hidden, clean, unembedding, bias = ends(rows=400, width=4, vocabulary=100)
    log_p = F.linear(clean, unembedding, bias).log_softmax(-1)
    hidden.requires_grad_()
    index = torch.zeros(400, dtype=torch.long)
    with Watch() as watch:
        unembed_kl(hidden, unembedding, bias, log_p, index, chunk_elements=1000).sum().backward()
    assert watch.peak < 400 * 100 * 8 / 2
    assert watch.largest <= 400 * 4 * 8  # hidden's own size
