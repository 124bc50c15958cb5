"""The attention kernel against a loop over queries and keys: values, gradients, backends, memory."""

from __future__ import annotations

import pytest
import torch
from twins import Watch, attention_loop, close, gradients

from spdcli.engine import attention
from spdcli.engine.attention import importance_attention
from spdcli.engine.part_tables import BACKENDS

FORMS = pytest.mark.parametrize("form", ["scalar", "query"])
CAUSAL = pytest.mark.parametrize("causal", [False, True])
M, B, T, K, I = 2, 3, 7, 3, 5
PADDED = torch.arange(T) < torch.tensor([[T], [3], [5]])  # lengths of the three sequences
PADDING = pytest.mark.parametrize("valid", [None, PADDED], ids=["whole", "padded"])
NOISY = pytest.mark.filterwarnings("ignore:.*torch.compile")  # flex on the CPU is a reference, and says it is slow


def tensors(form: str, longest: int = T) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    offsets = 2 * longest - 1
    shapes = [(M, B, T, K), (M, B, T, K), (M, B, T, I), (M, offsets) if form == "scalar" else (M, offsets, K)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@FORMS
@CAUSAL
@PADDING
@pytest.mark.parametrize(("backend", "longest"), [("dense", T), ("dense", T + 4), ("blocked", T), ("auto", T + 4)])
def test_every_backend_is_algorithm_1_line_4(backend, longest, valid, causal, form):
    given = tensors(form, longest)
    out = importance_attention(*given, causal, backend, valid)
    expected = attention_loop(*given, causal, valid)
    close(out, expected)
    weights = torch.randn_like(out)
    for actual, wanted in zip(gradients(out, weights, given), gradients(expected, weights, given), strict=True):
        close(actual, wanted)


@FORMS
@CAUSAL
@PADDING
@pytest.mark.parametrize("sequences", [1, 2, 3])  # of 3: by themselves, ragged, all
@pytest.mark.parametrize("rows", [1, 2, 3, 5])  # of 7 queries: single rows, and ragged last strips of 1, 1 and 2
def test_strips_change_nothing(rows, sequences, valid, causal, form, monkeypatch):
    monkeypatch.setattr(attention, "STRIP", (rows, sequences * rows * T + 1))
    given = tensors(form, T + 2)
    dense = importance_attention(*given, causal, "dense", valid)
    strips = importance_attention(*given, causal, "blocked", valid)
    close(strips, dense)
    weights = torch.randn_like(dense)
    for actual, wanted in zip(gradients(strips, weights, given), gradients(dense, weights, given), strict=True):
        close(actual, wanted)


@FORMS
def test_in_bfloat16_strips_are_as_right_as_all_at_once(form):
    exact = tensors(form)
    narrow = [t.detach().bfloat16().requires_grad_() for t in exact]
    weights = torch.randn(M, B, T, I)
    wanted = gradients(importance_attention(*exact), weights.double(), exact)
    errors = {
        backend: [
            float((got.double() - right).norm() / right.norm())
            for got, right in zip(
                gradients(importance_attention(*narrow, backend=backend), weights.bfloat16(), narrow),
                wanted,
                strict=True,
            )
        ]
        for backend in ("dense", "blocked")
    }
    assert all(ours < 2 * theirs for ours, theirs in zip(errors["blocked"], errors["dense"], strict=True)), errors


def test_strips_see_who_needs_a_gradient():
    q, k, v, relative = (t.detach() for t in tensors("scalar"))
    v.requires_grad_()
    out = importance_attention(q, k, v, relative, backend="blocked")
    close(*torch.autograd.grad(out.sum(), v), *torch.autograd.grad(attention_loop(q, k, v, relative, False).sum(), v))


@NOISY
@CAUSAL
@PADDING
@pytest.mark.parametrize("longest", [T, T + 4])
def test_flex_agrees_where_it_can(longest, valid, causal):
    given = [t.detach() for t in tensors("scalar", longest)]
    close(importance_attention(*given, causal, "flex", valid), importance_attention(*given, causal, "dense", valid))


def test_flex_says_what_it_cannot():
    with pytest.raises(ValueError, match="no backward on the CPU"):
        importance_attention(*tensors("scalar"), backend="flex")
    with torch.no_grad(), pytest.raises(ValueError, match="query-dependent"):
        importance_attention(*tensors("query"), backend="flex")


@FORMS
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_longer_than_the_table_is_refused(backend, form):
    with torch.no_grad(), pytest.raises(ValueError, match="7 positions, but relative biases for 6"):
        importance_attention(*tensors(form, T - 1), backend=backend)


def test_a_hand_worked_case():
    # Two positions, nothing but the bias: ln 3 for "one back" weighs position 0 three to one, ln 3 = 1.0986.
    zero = torch.zeros(1, 1, 2, 1)
    v = torch.tensor([[[[1.0], [5.0]]]])
    relative = torch.tensor([[3.0, 1.0, 1.0]]).log()  # offsets -1, 0, 1
    out = importance_attention(zero, zero, v, relative)
    torch.testing.assert_close(out.flatten(), torch.tensor([3.0, 2.0]))  # (1 + 5) / 2 and (3 * 1 + 5) / 4


@FORMS
def test_long_sequences_never_hold_all_pairs(form):
    length = 4096
    offsets = 2 * length - 1
    shape = (1, offsets) if form == "scalar" else (1, offsets, 2)
    given = [torch.randn(1, 1, length, 2, dtype=torch.float64).requires_grad_() for _ in range(3)]
    given.append(torch.randn(shape, dtype=torch.float64).requires_grad_())
    with Watch() as watch:
        importance_attention(*given).sum().backward()
    pairs = length * length * 8
    assert watch.largest < pairs / 64  # a strip has 32 of the 4096 rows
    assert watch.peak < pairs / 8  # forward and backward of a strip at once, and all that is kept between strips
