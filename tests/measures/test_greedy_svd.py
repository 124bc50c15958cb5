"""`spd svd` against a model whose weights are changed by hand, one candidate at a time."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from small_runs import MODEL, TOY, loud_toy, model_recipe, one_line, save_toy, spd_here, toy_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from spdcli.commands.svd import Method
from spdcli.engine.forward import clean_pass
from spdcli.figures.curves import save_rank_curves
from spdcli.measures import evaluation, rank_curves
from spdcli.measures.evaluation import evaluate
from spdcli.measures.greedy_svd import (
    LEGEND,
    METHODS,
    compare,
    default_step,
    greedy,
    plain_set,
    plain_triples,
    weighted_set,
    weighted_triples,
)
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
from spdcli.runs.subject import language_subject, toy_subject

CPU = torch.device("cpu")
ALL = ["Q0", "K0", "V0", "Q1", "K1", "V1"]
DOUBLE = {"rel": 1e-9, "abs": 1e-12}  # sums in another order, in float64
FLOAT32 = {"rel": 1e-4, "abs": 1e-7}
SEQUENCES, SEED = 10, 4


def quiet(done, total):
    """No one to report to."""


def toy_data(folder, names=ALL, *changes):
    """A toy in float64 (so that rounding decides between no candidates), its decomposition, and 10 sequences."""
    recipe = toy_recipe(*changes, folder=folder)
    subject = toy_subject(recipe, loud_toy(recipe, seed=1).double())
    decomposition = start_decomposition(recipe, subject, list(names)).double()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in decomposition.importances.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
            if name.endswith("b2"):
                parameter += 0.3
                parameter[-1] = -9  # a slice that is active nowhere
        for name in names:
            decomposition.of(name).V.add_(0.05 * torch.randn_like(decomposition.of(name).V))
    return subject, decomposition, curve_data(subject, decomposition, SEQUENCES, SEED)


def tokens_of(data):
    return torch.cat([clean.batch.tokens for clean in data.cleans])


def inputs_of(subject, data):
    batch = dataclasses.replace(data.cleans[0].batch, tokens=tokens_of(data))
    batch = dataclasses.replace(batch, valid=batch.tokens >= 0, looked=batch.tokens >= 0)
    return clean_pass(subject.target, batch, data.names).inputs


class ByHand:
    """A model whose weights are written into its state dict, run whole for every question.

    `kl(weights)` is the mean KL from the model as it was, with some matrices replaced by `weights[m]` `[I, O]`.
    """

    def __init__(self, model, log_probs, keys):
        self.model, self.log_probs, self.keys = copy.deepcopy(model), log_probs, keys
        self.state = copy.deepcopy(self.model.state_dict())
        self.p = log_probs(self.model)

    def weight(self, name):
        key, transposed, (start, stop) = self.keys[name]
        stored = self.state[key].t() if transposed else self.state[key]
        return stored[:, start:stop]

    def kl(self, weights):
        state = {key: value.clone() for key, value in self.state.items()}
        for name, weight in weights.items():
            key, transposed, (start, stop) = self.keys[name]
            (state[key].t() if transposed else state[key])[:, start:stop] = weight
        self.model.load_state_dict(state)
        q = self.log_probs(self.model)
        return (self.p.exp() * (self.p - q)).sum(-1).mean().item()


def toy_by_hand(toy, tokens):
    keys = {
        f"{letter}{layer}": (f"blocks.{layer}.{letter.lower()}.weight", True, (0, toy.shape.d_model))
        for layer in range(toy.shape.layers)
        for letter in "QKV"
    }
    return ByHand(toy, lambda model: model.logits(tokens).log_softmax(-1), keys)


def slow_svd(weight):
    left, values, right = torch.linalg.svd(weight)
    return lambda rank: sum(
        (values[i] * torch.outer(left[:, i], right[i]) for i in range(rank)), torch.zeros_like(weight)
    )


def slow_weighted_svd(weight, inputs):
    """`C^(-1/2) svd(C^(1/2) W)`, with the roots written out."""
    squares, vectors = torch.linalg.eigh(inputs.t() @ inputs / len(inputs))
    root = vectors @ torch.diag(squares.sqrt()) @ vectors.t()
    inverse = vectors @ torch.diag(squares.rsqrt()) @ vectors.t()
    cut = slow_svd(root @ weight)
    return lambda rank: inverse @ cut(rank)


def algorithm_2(by_hand, cuts, ranks, step, tolerance=float("inf")):
    """Algorithm 2, line by line. `cuts[m](r)` is matrix m at rank r. Gives the order, the losses and the ranks."""
    order, losses, weights = [], [], {}
    current_loss = 0.0
    while current_loss <= tolerance and any(ranks.values()):
        tried = {}
        for name in (name for name in ranks if ranks[name] > 0):
            tried[name] = by_hand.kl(weights | {name: cuts[name](max(0, ranks[name] - step))})
        best = sorted(tried, key=tried.get)[0]
        if tried[best] > tolerance:
            break
        ranks = ranks | {best: max(0, ranks[best] - step)}
        weights[best] = cuts[best](ranks[best])
        current_loss = tried[best]
        order.append(best)
        losses.append(current_loss)
    return order, losses, ranks


def removals(curve):
    """Which matrix lost rank from each point to the next."""
    return [
        next(name for name in before.ranks if before.ranks[name] > after.ranks[name])
        for before, after in itertools.pairwise(curve)
    ]


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
    monkeypatch.setattr(evaluation, "SEQUENCES_AT_ONCE", at_once)
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


@torch.no_grad()
def test_the_target_is_left_as_it_was(tmp_path):
    subject, _, data = toy_data(tmp_path)
    before = copy.deepcopy(subject.toy.state_dict())
    compare(data, list(METHODS), 0.1, step=4)
    assert all(torch.equal(before[key], value) for key, value in subject.toy.state_dict().items())
    after = clean_pass(subject.target, data.cleans[0].batch, ALL)
    assert torch.equal(after.log_probs, data.cleans[0].log_probs)


def test_the_tolerance_ends_at_the_first_point_beyond_it():
    curve = [Point({"a": 3 - i}, kl) for i, kl in enumerate([0.0, 0.1, 0.5, 0.05])]
    assert within(curve, 0.2) is curve[1]  # that rank 0 is better again, Algorithm 2 never learns
    assert within(curve, 0.0) is curve[0]
    assert within(curve, 0.1) is curve[1]
    assert within(curve, 9.0) is curve[3]
    assert within(curve[1:], 0.0) is None


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


# --- the run's slices ------------------------------------------------------------------------------


@torch.no_grad()
def test_slices_go_in_the_order_of_their_mean_importance(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "SEQUENCES_AT_ONCE", 4)
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
    monkeypatch.setattr(evaluation, "SEQUENCES_AT_ONCE", 3)
    subject, decomposition, data = toy_data(tmp_path, ALL, f"slices.delta={delta}")
    assert len(data.cleans) == 4
    curve = by_threshold(data, quiet)
    found = evaluate(subject, decomposition, SEQUENCES, 0.0, SEED)
    shares = {"s1": 1, "m": 1, "s2": 1, "random": 5}
    active = {n: sum(shares[kind] * a for kind, a in of.items()) / 8 for n, of in found["active"].items()}
    assert curve[0].threshold == 0
    assert curve[0].ranks == pytest.approx(active)
    assert curve[0].kl == pytest.approx(found["metrics"]["recon"], **FLOAT32)

    at = next(point for point in curve if point.threshold == 0.5)
    closer = evaluate(subject, decomposition, SEQUENCES, 0.5, SEED)
    assert at.ranks == pytest.approx(
        {n: sum(shares[kind] * a for kind, a in of.items()) / 8 for n, of in closer["active"].items()}
    )
    assert curve[-1].rank == 0
    assert len(curve) > 5


@torch.no_grad()
def test_all_active_slices_masked_are_the_model_of_eval_and_fewer_are_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "SEQUENCES_AT_ONCE", 3)
    subject, decomposition, data = toy_data(tmp_path, ALL)
    curve = by_kept_and_masked(data, quiet)
    found = evaluate(subject, decomposition, SEQUENCES, 0.0, SEED)
    assert curve[0].rank == found["total_active"]
    assert curve[0].kl == pytest.approx(found["metrics"]["recon"], **FLOAT32)
    assert [point.rank for point in curve] == list(range(found["total_active"], -1, -1))
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


# --- all of them -----------------------------------------------------------------------------------


@torch.no_grad()
def test_every_method_keeps_less_and_less_and_says_what_it_does(tmp_path):
    assert list(METHODS) == list(LEGEND) == [method.value for method in Method]
    _, _, data = toy_data(tmp_path)
    heard = set()
    found = compare(data, list(METHODS), 0.05, report=lambda method, done, total: heard.add(method))
    assert {"greedy_svd", "weighted_svd"} <= heard
    assert found["looked_at"] == SEQUENCES
    for method, curve in found["curves"].items():
        ranks = [point["rank"] for point in curve]
        assert ranks == sorted(set(ranks), reverse=True), method
        assert ranks[-1] == 0
        assert all(point["kl"] >= 0 for point in curve)
        result = found["result"][method]
        if result is not None:
            assert result["kl"] <= 0.05
            assert result["total_rank"] == sum(result["ranks"].values())
            assert result["kl"] in [point["kl"] for point in curve if point["rank"] == result["total_rank"]]
    assert found["curves"]["greedy_svd"][0] == {"rank": 48, "kl": 0.0}
    # With every rank at 0 all methods are the same model, but for what their threshold means.
    ends = {curve[-1]["kl"] for curve in found["curves"].values()}
    assert max(ends) == pytest.approx(min(ends), **DOUBLE)


def test_means_are_over_all_looked_at_positions_of_all_batches(tmp_path):
    _, _, data = toy_data(tmp_path)
    halves = CurveData(data.target, data.decomposition, data.cleans * 2)
    assert halves.looked_at == 2 * data.looked_at
    assert halves.mean_kl([{"a": 3.0}, {"a": 5.0}]) == {"a": 8.0 / 20}


# --- the figure and the command --------------------------------------------------------------------


def test_the_figure_is_readable_in_grey_and_shows_its_curves(tmp_path):
    curves = {
        "greedy_svd": [{"rank": r, "kl": k} for r, k in ((40, 0.0), (20, 1e-4), (10, 0.01), (0, 2.0))],
        "spd": [{"rank": r, "kl": k} for r, k in ((9, 1e-4), (5, 0.01), (0, 2.0))],
    }
    paths = save_rank_curves(curves, LEGEND, 1e-3, tmp_path)
    assert [path.name for path in paths] == ["svd.png", "svd.svg"]
    pixels = imread(paths[0])[..., :3]
    assert abs(pixels - pixels.mean(-1, keepdims=True)).max() < 0.01
    assert (pixels < 0.1).all(-1).mean() > 0.005
    assert LEGEND["greedy_svd"] in paths[1].read_text()  # as a comment beside the drawn letters
    assert LEGEND["weighted_svd"] not in paths[1].read_text()
    save_rank_curves({"spd": curves["spd"][:1]}, LEGEND, 0.0, tmp_path / "one")
    save_rank_curves({"spd": [{"rank": 4, "kl": 0.0}]}, LEGEND, 0.0, tmp_path / "none")


@pytest.fixture
def spd(monkeypatch, capsys):
    return spd_here(monkeypatch, capsys)


@pytest.fixture
def toy_run(spd, tmp_path):
    trained = save_toy(tmp_path / "trained", toy_recipe(folder=tmp_path))
    (tmp_path / "small.toml").write_text(TOY.replace('"induction"', f'"induction"\npath = "{trained}"'))
    assert spd("decompose", tmp_path / "small.toml", "--out", tmp_path / "run")[0] == 0
    return tmp_path / "run"


def no_constant(text):
    raise AssertionError(f"{text} is not JSON")


def test_the_command_on_a_toy(spd, toy_run):
    code, printed, _ = spd("svd", toy_run, "--json", "--sequences", 20, "--tolerance", 0.5)
    assert code == 0
    data = json.loads(printed, parse_constant=no_constant)
    assert (data["schema"], data["run"], data["tolerance"]) == ("spd.svd/1", str(toy_run), 0.5)
    assert list(data["curves"]) == list(data["result"]) == list(METHODS)
    assert all({"rank", "kl"} <= set(point) for curve in data["curves"].values() for point in curve)
    assert list(data["result"]["greedy_svd"]["ranks"]) == ALL
    assert data["result"]["greedy_svd"]["kl"] <= 0.5
    assert {path.name for path in (toy_run / "figures").iterdir()} == {"svd.png", "svd.svg", "svd.json"}
    assert json.loads((toy_run / "figures/svd.json").read_text()) == data
    assert spd("svd", toy_run, "--json", "--sequences", 20, "--tolerance", 0.5)[1] == printed
    other = json.loads(spd("svd", toy_run, "--json", "--sequences", 20, "--seed", 9)[1])
    assert other["curves"] != data["curves"]


def test_the_command_prints_a_table_and_ends_with_the_figure(spd, toy_run):
    code, printed, _ = spd("svd", toy_run, "--sequences", 8, "--method", "spd", "--method", "greedy_svd", "--step", 4)
    assert code == 0
    assert printed.splitlines()[-1] == str(toy_run / "figures/svd.png")
    assert "greedy SVD" in printed
    assert "weighted" not in printed
    assert all(name in printed for name in (*ALL, "total", "KL"))
    assert spd("svd", toy_run, "-q", "--sequences", 8)[1] == f"{toy_run / 'figures/svd.png'}\n"


def test_a_method_that_never_reaches_the_tolerance_says_how_far_it_got(spd, toy_run):
    arguments = ("svd", toy_run, "--sequences", 8, "--tolerance", 0, "--method", "spd")
    assert "at best" in spd(*arguments)[1]
    assert json.loads(spd(*arguments, "--json")[1])["result"] == {"spd": None}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_command_on_a_language_model(request, spd, tmp_path, kind):
    folder = request.getfixturevalue(f"tiny_{kind}_dir")
    (tmp_path / "model.toml").write_text(MODEL.replace("MODEL", str(folder)).replace('"*.1.*"', '"*.1.*mlp*"'))
    assert spd("decompose", tmp_path / "model.toml", "--out", tmp_path / "run")[0] == 0
    code, printed, err = spd("svd", tmp_path / "run", "--json", "--tolerance", 0.1, "--step", 8)
    assert code == 0, err
    data = json.loads(printed, parse_constant=no_constant)
    assert data["looked_at"] == 5 + 7  # K-obe and T-iger are two tokens each, and the last one is not fed
    assert data["result"]["weighted_svd"]["total_rank"] <= data["result"]["greedy_svd"]["total_rank"]
    assert (tmp_path / "run/figures/svd.svg").exists()
    assert "total" in spd("svd", tmp_path / "run", "--method", "weighted_svd")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tolerance", "-1"),
        ("--tolerance", "nan"),
        ("--tolerance", "inf"),
        ("--method", "svd"),
        ("--step", "0"),
        ("--sequences", "0"),
    ],
)
def test_what_makes_no_sense_is_refused(spd, tmp_path, arguments):
    code, printed, err = spd("svd", tmp_path, *arguments)
    assert (code, printed) == (2, "")
    assert arguments[0] in err


def test_a_directory_without_a_run_is_refused(spd, tmp_path):
    code, _, err = spd("svd", tmp_path)
    assert code == 1
    one_line(err, "no run here")
