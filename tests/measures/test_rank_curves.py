"""The curves of a run's slices against weights changed by hand and against `spd eval`."""

from __future__ import annotations

import copy

import pytest
import torch
from pruned_by_hand import (
    ALL,
    CPU,
    DOUBLE,
    FLOAT32,
    SEED,
    SEQUENCES,
    inputs_of,
    quiet,
    tokens_of,
    toy_by_hand,
    toy_data,
)
from small_runs import model_recipe

from spdcli.engine.forward import clean_pass
from spdcli.measures import evaluation_data
from spdcli.measures.evaluation import evaluate_without_circuit
from spdcli.measures.greedy_svd import weighted_set
from spdcli.measures.rank_curves import (
    CurveData,
    Point,
    by_kept_and_masked,
    by_mean_importance,
    by_threshold,
    counts,
    curve_data,
    within,
)
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import language_subject


@torch.no_grad()
def test_slices_go_in_the_order_of_their_mean_importance(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_data, "SEQUENCES_AT_ONCE", 4)
    subject, decomposition, data = toy_data(tmp_path, ALL, "slices.delta=true")
    by_hand = toy_by_hand(subject.toy, tokens_of(data))
    inputs = inputs_of(subject, data)
    g, _ = decomposition.importance(inputs)
    means = {(name, c): g[name][..., c].mean().item() for name in ALL for c in range(5)}
    kept = sorted(means, key=lambda slice_: -means[slice_])
    never = [slice_ for slice_ in kept if means[slice_] == 0]
    assert len(never) >= len(ALL)
    curve = by_mean_importance(data)
    assert [point.rank for point in curve] == list(range(30, -1, -1))
    for point in curve:
        if 30 - len(never) < point.rank < 30:  # any of those that are never active may be the next
            continue
        chosen = kept[: int(point.rank)]
        assert point.ranks == {name: sum(n == name for n, _ in chosen) for name in ALL}
        weights = {name: torch.zeros(8, 8, dtype=torch.float64) for name in ALL}
        for name, c in chosen:
            weights[name] += torch.outer(decomposition.of(name).U[:, c], decomposition.of(name).V[c])
        assert point.kl == pytest.approx(by_hand.kl(weights), **DOUBLE)
    assert curve[0].kl > 1e-4  # without the delta, not the target


@torch.no_grad()
@pytest.mark.parametrize("delta", ["true", "false"])
def test_at_threshold_0_the_masked_model_is_that_of_eval(tmp_path, monkeypatch, delta):
    monkeypatch.setattr(evaluation_data, "SEQUENCES_AT_ONCE", 3)
    subject, decomposition, data = toy_data(tmp_path, ALL, f"slices.delta={delta}")
    assert len(data.cleans) == 4
    curve = by_threshold(data, quiet)
    evaluation = evaluate_without_circuit(subject, decomposition, SEQUENCES, 0.0, SEED)
    shares = {"s1": 1, "m": 1, "s2": 1, "random": 5}
    active = {n: sum(shares[kind] * a for kind, a in of.items()) / 8 for n, of in evaluation.active.items()}
    assert curve[0].threshold == 0
    assert curve[0].ranks == pytest.approx(active)
    assert curve[0].kl == pytest.approx(evaluation.metrics["recon"], **FLOAT32)

    at = next(point for point in curve if point.threshold == 0.5)
    closer = evaluate_without_circuit(subject, decomposition, SEQUENCES, 0.5, SEED)
    assert at.ranks == pytest.approx(
        {n: sum(shares[kind] * a for kind, a in of.items()) / 8 for n, of in closer.active.items()}
    )
    assert curve[-1].rank == 0
    assert len(curve) > 5


@torch.no_grad()
def test_all_active_slices_masked_are_the_model_of_eval_and_fewer_are_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_data, "SEQUENCES_AT_ONCE", 3)
    subject, decomposition, data = toy_data(tmp_path, ALL)
    curve = by_kept_and_masked(data, quiet)
    evaluation = evaluate_without_circuit(subject, decomposition, SEQUENCES, 0.0, SEED)
    assert curve[0].rank == evaluation.total_active
    assert curve[0].kl == pytest.approx(evaluation.metrics["recon"], **FLOAT32)
    assert [point.rank for point in curve] == list(range(evaluation.total_active, -1, -1))
    # With one slice left, it is the one of the largest mean importance; masks of the others are 0.
    means = {n: torch.cat([g[n] for _, g in data.importances()]).mean((0, 1)) for n in data.names}
    best = max(means, key=lambda name: means[name].max().item())
    assert curve[-2].ranks == {name: int(name == best) for name in data.names}


@torch.no_grad()
def test_a_cut_slice_counts_for_nothing_and_a_kept_one_for_its_importance(tmp_path):
    subject, decomposition, data = toy_data(tmp_path, ["V1"], "target.layers=2")
    g = decomposition.importance(data.cleans[0].inputs)[0]["V1"]
    threshold = 0.5
    assert ((g > 0) & (g <= threshold)).any()
    point = next(p for p in by_threshold(data, quiet) if p.threshold == threshold)
    own = decomposition.of("V1")
    toy, batch = copy.deepcopy(subject.toy), data.cleans[0].batch
    mask = torch.where(g > threshold, g, 0.0)
    toy.blocks[1].v.forward = lambda x: torch.einsum("bti,ic,btc,co->bto", x, own.U, mask, own.V)
    p, q = (model.logits(batch.tokens).log_softmax(-1) for model in (subject.toy, toy))
    assert point.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), **DOUBLE)
    assert point.rank == pytest.approx((g > threshold).sum(-1).double().mean().item())


def test_where_a_long_curve_is_measured():
    assert counts(0) == [0]
    assert counts(5) == [5, 4, 3, 2, 1, 0]
    assert counts(100) == list(range(100, -1, -1))
    many = counts(5000)
    assert many == sorted(set(many), reverse=True)
    assert (many[0], many[-1]) == (5000, 0)
    assert set(range(65)) <= set(many)
    assert len(many) <= 129


@torch.no_grad()
def test_padding_is_no_data(tmp_path, tiny_gpt2_dir):
    recipe = model_recipe(tiny_gpt2_dir, "slices.matrices=['h.1.mlp.c_fc']", folder=tmp_path)
    subject = language_subject(recipe, CPU)
    decomposition = start_decomposition(recipe, subject, ["h.1.mlp.c_fc"])
    data = curve_data(subject, decomposition, 1, 0)
    clean = data.cleans[0]
    inputs, valid = clean.inputs["h.1.mlp.c_fc"], clean.batch.valid
    assert not valid.all()
    inputs[~valid] = 100.0
    assert weighted_set(data).of("h.1.mlp.c_fc").U.shape == (32, 12)  # two prompts of 5 and 7 tokens
    g = decomposition.importance({"h.1.mlp.c_fc": inputs}, valid)[0]["h.1.mlp.c_fc"]
    assert by_threshold(data, quiet)[0].rank == pytest.approx(((g > 0).sum(-1) * valid).sum().item() / 12)
    order = torch.stack([g[valid][:, c].sum() for c in range(6)]).argsort(descending=True, stable=True)
    curve = by_mean_importance(data)
    own, weight = decomposition.of("h.1.mlp.c_fc"), subject.target.matrices["h.1.mlp.c_fc"].weight
    before = weight.clone()
    for point in curve[1:-1]:
        kept = order[: int(point.rank)]
        weight.copy_(own.U[:, kept] @ own.V[kept])
        q = clean_pass(subject.target, clean.batch, ()).log_probs
        p = clean.log_probs
        assert point.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3, abs=1e-6)
    weight.copy_(before)


def test_the_tolerance_ends_at_the_first_point_beyond_it():
    curve = [Point({"a": 3 - i}, kl) for i, kl in enumerate([0.0, 0.1, 0.5, 0.05])]
    assert within(curve, 0.2) is curve[1]  # that rank 0 is better again, Algorithm 2 never learns
    assert within(curve, 0.0) is curve[0]
    assert within(curve, 0.1) is curve[1]
    assert within(curve, 9.0) is curve[3]
    assert within(curve[1:], 0.0) is None


def test_means_are_over_all_looked_at_positions_of_all_batches(tmp_path):
    _, _, data = toy_data(tmp_path)
    halves = CurveData(data.target, data.decomposition, data.cleans * 2)
    assert halves.looked_at == 2 * data.looked_at
    assert halves.mean_kl([{"a": 3.0}, {"a": 5.0}]) == {"a": 8.0 / 20}
