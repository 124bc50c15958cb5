"""Every loss by hand, and the KL through the unembedding against plain autograd."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch.nn import functional as F
from twins import Watch, close, gradients

from spdcli.engine.losses import (
    annealed_value,
    faithfulness,
    frequency,
    mean_over_matrices,
    mean_over_weights,
    minimality,
    penalties,
    probed_errors,
    relative_faithfulness,
    smooth_l0,
    unembed_kl,
    unembed_mse,
)
from spdcli.engine.target import LogitMap


def test_faithfulness_by_hand():
    first = (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 2.0]]))
    second = (torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0, 1.0, 1.0]]))
    # 3² + 4² of four weights and 1² of three.
    assert faithfulness({"a": first, "b": second}).item() == pytest.approx(26 / 7)
    # 3² + 4² of 1² + 2² + 3² + 4², and all of the second.
    assert relative_faithfulness({"a": first, "b": second}).item() == pytest.approx((25 / 30 + 1) / 2)


def test_relative_faithfulness_knows_no_scale_and_a_matrix_of_zeros_is_no_division_by_zero():
    weight, U, V = torch.randn(4, 3), torch.randn(4, 2), torch.randn(2, 3)
    large = relative_faithfulness({"a": (100 * weight, 10 * U, 10 * V)})
    close(large, relative_faithfulness({"a": (weight, U, V)}), 1e-5)  # float32
    nothing = (torch.zeros(2, 2), torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0, 0.0]]))
    assert relative_faithfulness({"a": nothing}).item() == 4


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
    every_error = torch.cat([(weight - U @ V).square().flatten() for weight, U, V in pairs.values()])
    shares = [(weight - U @ V).square().sum() / weight.norm() ** 2 for weight, U, V in pairs.values()]
    slow = every_error.mean(), sum(shares) / len(shares)
    factor = torch.tensor(1.7, dtype=torch.float64)
    for actual, expected in zip((faithfulness(pairs), relative_faithfulness(pairs)), slow, strict=True):
        close(actual, expected)
        for a, b in zip(gradients(actual, factor, leaves), gradients(expected, factor, leaves), strict=True):
            close(a, b)


@pytest.mark.parametrize(
    ("exact", "mean"), [(faithfulness, mean_over_weights), (relative_faithfulness, mean_over_matrices)]
)
def test_probes_are_unbiased(exact, mean):
    """The mean over every sign vector there is, which is what random ones expect, is the exact value and gradient."""
    pairs = random_pairs()
    leaves = [leaf for _, U, V in pairs.values() for leaf in (U, V)]
    everyone = {
        name: torch.tensor(list(product((-1.0, 1.0), repeat=len(weight))), dtype=torch.float64)
        for name, (weight, _, _) in pairs.items()
    }
    value, estimate = exact(pairs), mean(probed_errors(pairs, everyone), pairs)
    close(estimate, value)
    one = torch.ones((), dtype=torch.float64)
    for a, b in zip(gradients(estimate, one, leaves), gradients(value, one, leaves), strict=True):
        close(a, b)
    few = mean(probed_errors(pairs, {name: signs[:2] for name, signs in everyone.items()}), pairs)
    assert abs(few - value) > 0.01 * value  # some alone are not


def test_minimality_by_hand():
    g = {
        "a": torch.tensor([[[0.25, 1.0], [4.0, 0.0], [100.0, 100.0]]]),
        "b": torch.tensor([[[0.0], [0.09], [100.0]]]),
    }
    valid = torch.tensor([[True, True, False]])
    # Square roots: 0.5 + 1 + 0 at the first position, 2 + 0 + 0.3 at the second; the third is padding.
    assert minimality(powers(g, 0.5, 0.0), valid).item() == pytest.approx((1.5 + 2.3) / 2)
    # epsilon counts inside the power, and not by itself: (0.21 + 0.04) ** 0.5 - 0.04 ** 0.5 = 0.3.
    everywhere = torch.ones(1, 1, dtype=torch.bool)
    assert minimality(powers({"a": torch.tensor([[[0.21]]])}, 0.5, 0.04), everywhere) == pytest.approx(0.3)
    assert minimality(powers({"a": torch.zeros(1, 1, 3)}, 0.1, 1e-12), everywhere) == 0


def powers(g, p, epsilon):
    return penalties(g, "power", p, epsilon)


def test_smooth_l0_by_hand():
    g = torch.tensor([0.0, 0.1, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    cost = smooth_l0(g, 0.1, 1e-12)
    assert cost.tolist() == pytest.approx([0, 1 / 2, 9 / 10, 100 / 101])
    (slope,) = torch.autograd.grad(cost.sum(), g)
    # 2 g gamma² / (g² + gamma²)²: flat at 0, where a power has an infinite slope.
    assert slope.tolist() == pytest.approx([0, 0.002 / 0.0004, 0.006 / 0.01, 0.02 / 1.01**2])
    costs = penalties({"a": g.detach()[None, None]}, "smooth_l0", 0.1, 1e-12)
    assert minimality(costs, torch.ones(1, 1, dtype=torch.bool)).item() == pytest.approx(1.4 + 100 / 101)


def test_frequency_by_hand():
    costs = {
        "a": torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.5], [9.0, 9.0]]]),
        "b": torch.tensor([[[1.0], [1.0]], [[1.0], [9.0]]]),
    }
    valid = torch.tensor([[True, True], [True, False]])
    # Means over the three real positions: 2/3 and 1/6, and 1. With n = 6: log2(5), log2(2) and log2(7).
    expected = 2 / 3 * math.log2(5) + 1 / 6 + math.log2(7)
    assert frequency(costs, valid, 6).item() == pytest.approx(expected)
    # Two slices that share the work of one are cheaper: f log2(1 + n f) is convex.
    one = {"a": torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])}
    two = {"a": torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])}
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    assert minimality(one, everywhere) == minimality(two, everywhere)
    assert frequency(one, everywhere, 3).item() == 2  # f = 1: log2(4)
    assert frequency(two, everywhere, 3).item() == pytest.approx(math.log2(2.5))  # f = 1/2, twice


def test_frequency_does_not_depend_on_how_many_sequences_a_batch_has():
    costs = {"a": torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    valid = torch.tensor([[True, True, False], [True, True, True]])
    again = {"a": costs["a"].repeat(5, 1, 1)}
    close(frequency(again, valid.repeat(5, 1), 100), frequency(costs, valid, 100))


@pytest.mark.parametrize(("step", "p"), [(0, 0.9), (50, 0.5), (100, 0.1)])
def test_p_falls_in_a_line_from_the_first_step_to_the_last(step, p):
    assert annealed_value(step, 101, 0.9, 0.1) == pytest.approx(p)


def test_p_of_a_single_step_is_where_it_starts():
    assert annealed_value(0, 1, 0.9, 0.1) == 0.9


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


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_unembed_kl_of_scaled_and_capped_logits(scale, cap, reverse):
    hidden, clean, unembedding, bias = ends()
    logits = lambda x: scale * F.linear(x, unembedding, bias)  # noqa: E731
    capped = (lambda z: z) if cap is None else (lambda z: cap * torch.tanh(z / cap))
    log_p, index = capped(logits(clean)).log_softmax(-1), torch.tensor([4, 0, 2, 2, 1, 3, 0])
    hidden.requires_grad_()
    logit_map = LogitMap(scale, cap)
    actual = unembed_kl(hidden, unembedding, bias, log_p, index, reverse, logit_map, chunk_elements=3 * 11 + 1)
    log_q = capped(logits(hidden)).log_softmax(-1)
    pair = (log_p[index], log_q) if reverse else (log_q, log_p[index])
    expected = F.kl_div(*pair, reduction="none", log_target=True).sum(-1)
    close(actual, expected)
    weights = torch.randn(7, dtype=torch.float64)
    close(*gradients(actual, weights, [hidden]), *gradients(expected, weights, [hidden]))


@pytest.mark.parametrize("reverse", [False, True])
def test_unembed_kl_of_bfloat16_is_that_of_the_same_logits_in_float32(reverse):
    hidden, clean, unembedding, bias = (tensor.to(torch.bfloat16) for tensor in ends())
    log_p, index = F.linear(clean, unembedding, bias).float().log_softmax(-1), torch.arange(5)
    actual = unembed_kl(hidden[:5].requires_grad_(), unembedding, bias, log_p, index, reverse)
    log_q = (hidden[:5] @ unembedding.t() + bias).float().log_softmax(-1)
    pair = (log_p, log_q) if reverse else (log_q, log_p)
    expected = F.kl_div(*pair, reduction="none", log_target=True).sum(-1)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)  # float32
    actual.sum().backward()
    assert hidden.dtype == torch.bfloat16


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


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_squared_error_is_that_of_every_number_of_a_vector(with_bias):
    """Against a loop, with rows that answer to the same vector; forward and backward."""
    generator = torch.Generator().manual_seed(8)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, unembedding, target, index = make(4, 3).requires_grad_(), make(5, 3), make(2, 5), torch.tensor([1, 0, 1, 1])
    bias = make(5) if with_bias else None
    rows = []
    for n in range(4):
        errors = [
            (hidden[n] @ unembedding[j] + (0 if bias is None else bias[j]) - target[index[n], j]) ** 2 for j in range(5)
        ]
        rows.append(sum(errors) / 5)
    expected, weights = torch.stack(rows), make(4)
    (slope,) = gradients(expected, weights, [hidden])
    for reverse in (False, True):
        actual = unembed_mse(hidden, unembedding, bias, target, index, reverse)
        close(actual, expected)
        close(gradients(actual, weights, [hidden])[0], slope)
