"""Greedy pruning against a model whose weights are changed by hand, and singular triples against their definition."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned_by_hand import (
    ALL,
    CPU,
    DOUBLE,
    SEQUENCES,
    ByHand,
    algorithm_2,
    inputs_of,
    quiet,
    removals,
    slow_svd,
    slow_weighted_svd,
    tokens_of,
    toy_by_hand,
    toy_data,
)
from small_runs import model_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from spdcli.measures import evaluation_data, rank_curves
from spdcli.measures.greedy_svd import default_step, greedy, plain_set, plain_triples, weighted_set, weighted_triples
from spdcli.measures.rank_curves import (
    curve_data,
    within,
)
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import language_subject

# --- Algorithm 2 -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("names", "changes", "step", "plan_bytes", "at_once"),
    [
        (ALL, [], 1, 2**28, 512),
        (ALL, ["target.heads=2", "target.layer_norm=true"], 3, 1, 4),  # every sequence of every candidate on its own
        (["K0", "Q1", "V1"], [], 1, 20_000, 7),
    ],
)
def test_the_greedy_order_is_that_of_algorithm_2(tmp_path, monkeypatch, names, changes, step, plan_bytes, at_once):
    monkeypatch.setattr(rank_curves, "PLAN_BYTES", plan_bytes)
    monkeypatch.setattr(evaluation_data, "SEQUENCES_AT_ONCE", at_once)
    subject, _, data = toy_data(tmp_path, names, *changes)
    assert len(data.cleans) == -(-SEQUENCES // at_once)
    by_hand = toy_by_hand(subject.toy, tokens_of(data))
    cuts = {name: slow_svd(by_hand.weight(name)) for name in names}
    order, losses, _ = algorithm_2(by_hand, cuts, dict.fromkeys(names, 8), step)
    assert len(set(order)) == len(names)
    assert max(losses) > 0.1

    curve = greedy(data, plain_set(data), step, quiet)
    assert removals(curve) == order
    assert [point.kl for point in curve] == pytest.approx([0, *losses], **DOUBLE)
    assert curve[0].ranks == dict.fromkeys(names, 8)
    assert curve[-1].rank == 0

    tolerance = losses[len(losses) // 2] * 1.001
    order, losses, ranks = algorithm_2(by_hand, cuts, dict.fromkeys(names, 8), step, tolerance)
    stop = within(curve, tolerance)
    assert (stop.ranks, stop.kl) == (ranks, pytest.approx(losses[-1], **DOUBLE))


@torch.no_grad()
def test_the_weighted_order_is_that_of_algorithm_2_on_weighted_triples(tmp_path):
    subject, _, data = toy_data(tmp_path)
    by_hand = toy_by_hand(subject.toy, tokens_of(data))
    inputs = inputs_of(subject, data)
    flat = {name: inputs[name].flatten(0, 1) for name in ALL}
    assert all(torch.linalg.matrix_rank(x) >= 7 for x in flat.values())  # 6 tokens, s: V0 never reads the eighth way
    cuts, ranks = {}, {}
    for name in ALL:
        ranks[name] = int(torch.linalg.matrix_rank(flat[name]))
        weight = by_hand.weight(name)
        if ranks[name] == 8:
            cuts[name] = slow_weighted_svd(weight, flat[name])
        else:  # in the coordinates of what is read
            span = torch.linalg.svd(flat[name])[2][: ranks[name]]
            cut = slow_weighted_svd(span @ weight, flat[name] @ span.t())
            cuts[name] = lambda rank, cut=cut, span=span: span.t() @ cut(rank)
    order, losses, _ = algorithm_2(by_hand, cuts, ranks, 1)
    curve = greedy(data, weighted_set(data), 1, quiet)
    assert curve[0].ranks == ranks
    assert removals(curve) == order
    assert [point.kl for point in curve] == pytest.approx([0, *losses], rel=1e-6, abs=1e-11)


# h.1's c_attn is one fused module of three matrices, of which K is left alone; the padding is real.
LANGUAGE = {
    "gpt2": '["h.1.attn.c_attn.q", "h.1.attn.c_attn.v", "h.2.mlp.c_proj"]',
    "llama": '["layers.0.mlp.up_proj", "layers.1.self_attn.k_proj", "layers.2.mlp.down_proj"]',
}


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(LANGUAGE))
def test_a_language_model_is_pruned_as_by_hand(request, tmp_path, kind):
    folder = request.getfixturevalue(f"tiny_{kind}_dir")
    split = f"target.split_attention={str(kind == 'gpt2').lower()}"
    recipe = model_recipe(folder, f"slices.matrices={LANGUAGE[kind]}", split, folder=tmp_path)
    subject = language_subject(recipe, CPU)
    subject.target.model.double()
    names = json.loads(LANGUAGE[kind])
    data = curve_data(subject, start_decomposition(recipe, subject, names), 1, 0)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer(text)["input_ids"][:-1] for text in recipe.data.prompts]
    assert len({len(ids) for ids in texts}) == 2

    def log_probs(model):
        return torch.cat([model(torch.tensor([ids])).logits[0] for ids in texts]).log_softmax(-1)

    modules = {id(module): path for path, module in subject.target.model.named_modules()}
    keys = {}
    for name in names:
        matrix = subject.target.matrices[name]
        keys[name] = (f"{modules[id(matrix.module)]}.weight", matrix.transposed, matrix.columns)
    by_hand = ByHand(model, log_probs, keys)
    ranks = {name: int(torch.linalg.matrix_rank(by_hand.weight(name))) for name in names}
    cuts = {name: slow_svd(by_hand.weight(name)) for name in names}
    order, losses, _ = algorithm_2(by_hand, cuts, ranks, 5)
    curve = greedy(data, plain_set(data), 5, quiet)
    assert len(set(order)) == len(names)
    assert removals(curve) == order
    assert [point.kl for point in curve] == pytest.approx([0, *losses], rel=1e-6, abs=1e-10)


def test_the_default_step_is_one_for_the_toy_and_bounds_the_rounds():
    assert default_step(6 * 16, 6) == 1
    assert default_step(128, 6) == 1
    assert default_step(129, 6) == 2
    for total, matrices in ((768 * 72, 72), (5000, 3), (0, 2)):
        step = default_step(total, matrices)
        assert step >= 1
        assert matrices + total / step <= max(128, 4 * matrices) + matrices


# --- singular triples ------------------------------------------------------------------------------


def approximation(slices, rank):
    return slices.U[:, :rank] @ slices.V[:rank]


@torch.no_grad()
@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 30), st.integers(0, 10**6))
def test_weighted_triples_are_the_best_of_their_rank_on_the_data(d_in, d_out, count, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = normal(d_in, d_out)
    inputs = normal(count, d_in) @ (normal(d_in, d_in) * 2.0 ** normal(d_in))
    plain, weighted = plain_triples(weight), weighted_triples(weight, inputs)
    wanted = inputs @ weight
    scale = wanted.norm().item()
    best = torch.linalg.svd(wanted)[1]  # Eckart and Young, for the outputs
    for rank in range(weighted.U.shape[1] + 1):
        error = (wanted - inputs @ approximation(weighted, rank)).norm().item()
        assert error <= (wanted - inputs @ approximation(plain, rank)).norm().item() + 1e-6 * scale
        assert error == pytest.approx(best[rank:].norm().item(), abs=1e-6 * scale)
    assert weighted.U.shape[1] <= min(count, d_in, d_out)


@torch.no_grad()
def test_weighted_triples_of_white_inputs_are_the_plain_ones():
    torch.manual_seed(0)
    weight = torch.randn(6, 9, dtype=torch.float64)
    white = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64))[0] * 40**0.5
    torch.testing.assert_close(white.t() @ white / 40, torch.eye(6, dtype=torch.float64))
    plain, weighted = plain_triples(weight), weighted_triples(weight, white)
    for rank in range(7):
        torch.testing.assert_close(approximation(weighted, rank), approximation(plain, rank))


@torch.no_grad()
def test_triples_end_at_the_numerical_rank():
    torch.manual_seed(0)
    low = torch.randn(20, 3) @ torch.randn(3, 12)  # float32: what is rounded away is not rank
    assert plain_triples(low).U.shape == (20, 3)
    torch.testing.assert_close(approximation(plain_triples(low), 3), low)
    half = plain_triples(low.bfloat16())
    assert half.U.dtype == torch.bfloat16
    assert 3 <= half.U.shape[1] <= 12
    seen = torch.randn(50, 2) @ torch.randn(2, 20)
    assert weighted_triples(low, seen).V.shape == (2, 12)
    assert plain_triples(torch.zeros(4, 5)).V.shape == (0, 5)
    assert weighted_triples(low, torch.zeros(9, 20)).U.shape == (20, 0)


@torch.no_grad()
def test_rounding_of_the_inputs_is_no_direction_of_theirs():
    torch.manual_seed(0)
    weight, read = torch.randn(8, 8), torch.randn(3, 8)
    span = torch.linalg.svd(read)[2][:3]
    slices = weighted_triples(weight, torch.randn(60, 3) @ read + 1e-7 * torch.randn(60, 8))
    assert slices.U.shape == (8, 3)
    off_span = slices.U - span.t() @ (span @ slices.U)
    assert off_span.norm() < 1e-5 * slices.U.norm()  # dividing by a root of 1e-7 would make it as large as U
