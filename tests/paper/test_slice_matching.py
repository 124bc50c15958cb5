"""Matching slices: copies are found again, effects do not depend on a basis, the assignment is the best one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from small_circuits import ALL, small_circuit, uneven_gates
from small_runs import loud_toy, toy_recipe

from spdcli.engine.subcomponents import Slices
from spdcli.measures.circuit_data import circuit_data
from spdcli.measures.slice_similarity import Signature, match, similarity, weight_signature
from spdcli.paper.slice_matching import effect_signatures, stability
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import toy_subject

ORDER = [3, 0, 4, 1, 2]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def random_slices(seed=0, count=5):
    generator = torch.Generator().manual_seed(seed)
    return Slices(torch.randn(6, count, generator=generator), torch.randn(count, 4, generator=generator))


def shuffled(slices):
    """The same slices in another order, some with both signs turned, some rescaled between U and V."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    scale = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    return Slices(slices.U[:, ORDER] * signs * scale, slices.V[ORDER] * (signs / scale)[:, None])


def test_shuffled_copies_are_found_again():
    slices = random_slices()
    one, other = (weight_signature(s, range(5)) for s in (slices, shuffled(slices)))
    pairs = match(other, one)
    assert {copy: original for copy, (original, _) in pairs.items()} == dict(enumerate(ORDER))
    assert [score for _, score in pairs.values()] == pytest.approx([1.0] * 5)
    assert [entry.score for entry in stability([{"Q0": one}, {"Q0": other}])] == pytest.approx([1.0] * 10)


def test_similarity_is_the_cosine_of_the_outer_products():
    first, second = random_slices(1), random_slices(2)
    scores = similarity(weight_signature(first, [0, 2]), weight_signature(second, [1, 3, 4]))
    for i, c in enumerate([0, 2]):
        for j, d in enumerate([1, 3, 4]):
            a, b = torch.outer(first.U[:, c], first.V[c]), torch.outer(second.U[:, d], second.V[d])
            assert scores[i, j].item() == pytest.approx(abs((a * b).sum() / a.norm() / b.norm()).item(), rel=1e-5)


def test_the_assignment_is_the_best_of_all():
    one, other = weight_signature(random_slices(3), range(4)), weight_signature(random_slices(4), range(5))
    scores = similarity(one, other)
    best = max(sum(scores[i, j].item() for i, j in enumerate(p)) for p in itertools.permutations(range(5), 4))
    pairs = match(one, other)
    assert sum(score for _, score in pairs.values()) == pytest.approx(best)
    assert len({partner for partner, _ in pairs.values()}) == 4


def test_a_slice_without_a_partner_scores_nothing():
    slices = random_slices()
    runs = [{"V1": weight_signature(slices, chosen)} for chosen in ([0, 1, 2], [0, 2], [])]
    scores = {(entry.run, entry.slice): entry for entry in stability(runs)}
    assert scores[0, "V1:0"].score == pytest.approx(0.5)  # found in run 1, not in the empty run 2
    assert scores[0, "V1:1"].score == 0
    assert scores[0, "V1:1"].matches == [(1, None, 0.0), (2, None, 0.0)]
    assert scores[1, "V1:2"].matches[0] == (0, "V1:2", pytest.approx(1.0))
    assert len(scores) == 5


# --- effects ---------------------------------------------------------------------------------------


def slow_scores(stage, row, layer, query, extra):
    """Scores of one query by key in the target, with `extra[letter][t]` added to what that matrix gives at t."""
    inputs = stage.clean.inputs
    q = inputs[f"Q{layer}"][row, query] @ stage.target.matrices[f"Q{layer}"].weight + extra("Q", query)
    keys = [
        inputs[f"K{layer}"][row, t] @ stage.target.matrices[f"K{layer}"].weight + extra("K", t)
        for t in range(query + 1)
    ]
    return torch.stack([q @ key / 2 for key in keys])


def centred(values, length):
    padded = torch.zeros(length)
    padded[: len(values)] = values - values.mean()
    return padded


def contribution(stage, name, row, t, c):
    own = stage.decomposition.of(name)
    return stage.g[name][row, t, c] * (stage.clean.inputs[name][row, t] @ own.U[:, c]) * own.V[c]


def slow_effect(stage, name, row, c):
    """What one slice alone adds to the target, found by adding it and taking the difference."""
    nothing = torch.zeros(4)
    layer = 0 if name in ("Q0", "K0") else 1
    query = int(stage.at["m" if layer == 0 else "s2"][row])
    if name == "V1":
        q, k = (stage.clean.inputs[f"{x}1"][row] @ stage.target.matrices[f"{x}1"].weight for x in "QK")
        attention = (k @ q[query] / 2).softmax(0)
        logits = stage.toy.unembed.weight @ sum(attention[t] * contribution(stage, "V1", row, t, c) for t in range(8))
        return logits - logits.mean()
    if name == "V0":
        x = stage.clean.inputs["Q0"][row]
        q, k = (x @ stage.target.matrices[n].weight for n in ("Q0", "K0"))
        arrived = []
        for t in range(8):
            attention = (k[: t + 1] @ q[t] / 2).softmax(0)
            arrived.append(sum(attention[j] * contribution(stage, "V0", row, j, c) for j in range(t + 1)))
        weight = stage.target.matrices["K1"].weight
        extra = lambda letter, t: arrived[t] @ weight if letter == "K" else nothing  # noqa: E731
    else:
        extra = lambda letter, t: contribution(stage, name, row, t, c) if letter == name[0] else nothing  # noqa: E731
    difference = slow_scores(stage, row, layer, query, extra) - slow_scores(
        stage, row, layer, query, lambda letter, t: nothing
    )
    return centred(difference, 8)


@pytest.mark.parametrize("name", ALL)
def test_an_effect_is_what_adding_the_slice_changes(tmp_path, name):
    stage = small_circuit(tmp_path)
    signature = effect_signatures(stage)[name]
    assert signature.labels == [0, 1]
    for row_of, c in enumerate(signature.labels):
        slow = torch.stack([slow_effect(stage, name, row, c) for row in range(5)])
        scores = signature.parts[0][row_of].view_as(slow)
        torch.testing.assert_close(scores, slow, atol=2e-5 * slow.abs().max().item() + 1e-6, rtol=1e-3)


def turned_twin(tmp_path):
    """Two toys that compute the same in different bases of their heads, and the same slices of both, shuffled."""
    recipe = toy_recipe("target.vocabulary=5", "slices.C=4", folder=tmp_path)
    stages = []
    for turned in (False, True):
        toy = loud_toy(recipe, seed=2)
        turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(7)))
        if turned:
            for block in toy.blocks:
                block.q.weight.copy_(turn.t() @ block.q.weight)
                block.k.weight.copy_(turn.t() @ block.k.weight)
        subject = toy_subject(recipe, toy)
        decomposition = uneven_gates(start_decomposition(recipe, subject, ALL))
        if turned:
            straight = stages[0].decomposition
            for name in ALL:
                own, original = decomposition.of(name), straight.of(name)
                own.U.copy_(original.U)
                own.V.copy_(original.V @ turn if name[0] in "QK" else original.V)
        stages.append(circuit_data(subject, decomposition, 30, 0.0, seed=0))
    return stages


def test_effects_do_not_see_the_basis_and_weights_do(tmp_path):
    straight, turned = turned_twin(tmp_path)
    one, other = effect_signatures(straight), effect_signatures(turned)
    for name in ALL:
        pairs = match(one[name], other[name])
        assert {c: d for c, (d, _) in pairs.items()} == {c: c for c in straight.active[name]}
        assert all(score == pytest.approx(1, abs=1e-4) for _, score in pairs.values()), name
    weights = [weight_signature(stage.decomposition.of("Q0"), stage.active["Q0"]) for stage in (straight, turned)]
    assert max(score for _, score in match(*weights).values()) < 0.9


def test_a_slice_that_does_nothing_is_like_no_other():
    nothing = Signature([0], (torch.zeros(1, 4),))
    assert match(nothing, Signature([1], (torch.ones(1, 4),))) == {0: (1, 0.0)}
    assert not math.isnan(similarity(nothing, nothing).item())
