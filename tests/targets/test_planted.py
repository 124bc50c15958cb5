"""Planted targets: their slices are what the answers need, each of them, and nothing else."""

from __future__ import annotations

import pytest
import torch

from spdcli.engine.forward import clean_pass, masked_logits
from spdcli.engine.masks import importance_masks
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.target import Batch
from spdcli.measures.slice_recovery import MATCHED
from spdcli.targets.planted import skewed_frame, spread_strengths
from spdcli.targets.planted_induction import (
    LOGIT,
    PlantedInductionShape,
    attention,
    draw_sequences,
    needed_slices,
    planted_induction,
    sink_score,
    spread_places,
)
from spdcli.targets.planted_lookup import PlantedLookupShape, planted_lookup, subjects_of_tokens

TARGETS = {
    "induction": lambda seed: planted_induction(PlantedInductionShape(), seed),
    "induction, three triggers": lambda seed: planted_induction(PlantedInductionShape(5, 3, 11, 28), seed),
    "induction, no sink": lambda seed: planted_induction(PlantedInductionShape(sink=False), seed),
    "lookup": lambda seed: planted_lookup(PlantedLookupShape(), seed),
    "lookup, small": lambda seed: planted_lookup(PlantedLookupShape(4, 9, 3, 13), seed),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Nats, of the needed slices alone, and without one of them. Where there is no sink, a query whose key is at 4, and
# others at 0, leaves some of its attention to them.
ENOUGH = dict.fromkeys(TARGETS, 2e-4) | {"induction, no sink": 5e-3}
MISSED = dict.fromkeys(TARGETS, 0.3) | {"induction": 0.8, "induction, three triggers": 0.8}


def divergence(planted, clean, masks):
    """KL(target || the planted slices masked by `masks`) at every position looked at."""
    slices = SliceSet(dict(planted.slices), delta=False)
    logits = masked_logits(planted.target, slices, clean, importance_masks(masks, False))
    return (clean.log_probs.exp() * (clean.log_probs - logits.log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("seed", [0, 7])
def test_the_needed_slices_are_enough_and_each_of_them_is_needed(name, seed):
    planted = TARGETS[name](seed)
    batch = planted.draw(256, generator(1))
    clean = clean_pass(planted.target, batch, planted.target.matrices)
    needed = {matrix: where.float() for matrix, where in planted.needed(batch).items()}
    assert divergence(planted, clean, needed).max() < ENOUGH[name]
    sequence = batch.looked.nonzero()[:, 0]
    for matrix, where in needed.items():
        for number in range(where.shape[-1]):
            without = needed | {matrix: where.index_fill(-1, torch.tensor(number), 0)}
            worst = torch.zeros(256).scatter_reduce(0, sequence, divergence(planted, clean, without), "amax")
            needing = where[..., number].any(1)
            assert worst[needing].min() > MISSED[name], f"{matrix}:{number}"
            assert (worst[~needing] < ENOUGH[name]).all(), f"{matrix}:{number}"


@pytest.mark.parametrize("name", TARGETS)
def test_every_matrix_is_the_sum_of_its_slices_which_are_no_singular_ones(name):
    planted = TARGETS[name](3)
    assert planted.slices.keys() == planted.target.matrices.keys()
    worst = []
    for matrix, slices in planted.slices.items():
        weight = planted.target.matrices[matrix].weight
        torch.testing.assert_close(weight, slices.U @ slices.V)
        assert torch.linalg.matrix_rank(weight) == slices.U.shape[1]
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        rank = slices.U.shape[1]
        u = (left[:, :rank].t() @ torch.nn.functional.normalize(slices.U, dim=0)).abs()
        v = (right[:rank] @ torch.nn.functional.normalize(slices.V, dim=1).t()).abs()
        worst.append((u * v).max(0).values.min())
    assert min(worst) < MATCHED, "every planted slice is a singular one"


@pytest.mark.parametrize("name", TARGETS)
def test_the_engine_sees_the_models_own_answers(name):
    planted = TARGETS[name](0)
    batch = planted.draw(5, generator())
    logits = planted.target.model(batch.tokens)
    clean = clean_pass(planted.target, batch, ())
    torch.testing.assert_close(clean.log_probs, logits.log_softmax(-1)[batch.looked])


def test_induction_answers_every_trigger_with_its_own_m():
    planted = planted_induction(PlantedInductionShape(triggers=3, length=11, d_model=40, strength_ratio=1), 0)
    batch = planted.draw(64, generator())
    best = planted.target.model(batch.tokens).argmax(-1)
    for tokens, guesses in zip(batch.tokens.tolist(), best.tolist(), strict=True):
        for place in (8, 9, 10):
            assert guesses[place] == tokens[tokens.index(tokens[place]) + 1]
    assert best[:, -1].equal(batch.answers)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 5)])
def test_a_sink_is_one_more_key_that_holds_nothing(shape):
    scores, values = torch.randn(*shape, dtype=torch.float64), torch.randn(shape[-1], 3, dtype=torch.float64)
    keys = torch.cat([torch.full((*shape[:-1], 1), 4.0, dtype=torch.float64), scores], -1)
    held = torch.cat([torch.zeros(1, 3, dtype=torch.float64), values])
    torch.testing.assert_close(attention(scores, 4.0) @ values, keys.softmax(-1) @ held)
    torch.testing.assert_close(attention(scores, None), scores.softmax(-1))


@pytest.mark.parametrize("length", [7, 8, 30, 60])
def test_a_query_that_finds_no_key_attends_to_the_sink(length):
    kept = attention(torch.zeros(length), sink_score(length)).sum()
    assert 0.1 < kept < 0.12


@pytest.mark.parametrize(("sink", "off"), [(True, 0.04), (False, 0.15)])
@pytest.mark.parametrize("length", [7, 12])
def test_the_answer_has_the_logit_that_it_is_given(length, sink, off):
    planted = planted_induction(PlantedInductionShape(length=length, d_model=36, sink=sink), 0)
    batch = planted.draw(64, generator())
    answers = planted.target.model(batch.tokens)[:, -1].gather(1, batch.answers[:, None])
    assert (answers - LOGIT).abs().max() < off


def test_flags_are_read_where_they_are_needed_and_nowhere_else():
    with_sink, without = (planted_induction(PlantedInductionShape(sink=sink), 0) for sink in (True, False))
    batch = with_sink.draw(64, generator())
    unneeded = ~(batch.classes["m"] | batch.classes["s2"])
    flags = []
    for planted in (with_sink, without):
        inputs = clean_pass(planted.target, batch, ["K1"]).inputs["K1"]
        read = inputs @ planted.slices["K1"].U * planted.slices["K1"].V.norm(dim=1)
        flags.append((read[unneeded].abs().max() / read.max()).item())
    assert flags[0] < 0.05
    assert flags[1] > 0.1


def test_what_a_sequence_of_induction_needs():
    shape = PlantedInductionShape(tokens=3, triggers=2, length=7, d_model=17)
    batch = draw_sequences(shape, 1, generator())
    row = torch.tensor([[4, 1, 3, 0, 2, 3, 4]])  # s1 of 4 at 0 and of 3 at 2, then both again
    s1 = torch.tensor([[1, 0, 1, 0, 0, 0, 0]]).bool()
    classes = {"s1": s1, "m": s1.roll(1, 1), "s2": torch.arange(7)[None] >= 5}
    batch = type(batch)(row, batch.valid, classes["s2"], classes=classes)
    needed = needed_slices(shape, batch)
    places = {name: where[0].nonzero().tolist() for name, where in needed.items()}
    assert places == {
        "Q0": [[1, 0], [3, 2]],
        "K0": [[0, 0], [2, 2]],
        "V0": [[0, 1], [2, 0]],
        "Q1": [[5, 0], [6, 1]],
        "K1": [[1, 1], [3, 0]],
        "V1": [[1, 1], [3, 0]],
    }


def test_sequences_of_induction():
    shape = PlantedInductionShape(tokens=4, triggers=3, length=10)
    batch = draw_sequences(shape, 500, generator())
    triggers = batch.tokens >= 4
    assert triggers.eq(batch.classes["s1"] | batch.classes["s2"]).all()
    assert triggers[:, :7].sum(1).eq(3).all()
    assert batch.tokens[:, 7:].sort(1).values.eq(torch.tensor([4, 5, 6])).all()
    assert batch.tokens[batch.classes["s1"]].view(500, 3).sort(1).values.eq(torch.tensor([4, 5, 6])).all()
    assert batch.classes["m"].sum(1).eq(3).all()
    assert not (batch.classes["m"] & triggers).any()
    assert batch.looked.eq(batch.classes["s2"]).all()


def test_places_are_spread_evenly_and_are_no_neighbours():
    places = spread_places(6000, 2, 5, generator())
    counts = torch.bincount(places[:, 0] * 5 + places[:, 1], minlength=25).view(5, 5)
    allowed = torch.ones(5, 5).triu(2).bool()
    assert counts[~allowed].sum() == 0
    assert (counts[allowed] - 1000).abs().max() < 150  # five standard deviations


@pytest.mark.parametrize(("tokens", "least", "most"), [(4, 0, 0), (9, 0, 1), (10, 1, 1), (30, 4, 5)])
def test_tokens_name_one_subject_each_and_then_every_pair_as_often(tokens, least, most):
    named = subjects_of_tokens(PlantedLookupShape(subjects=4, tokens=tokens), generator())
    assert named.shape == (tokens, 4)
    assert named[:4].equal(torch.eye(4))
    assert named[4:].sum(1).eq(2).all()
    together = named[4:].t() @ named[4:]
    pairs = together[torch.ones(4, 4).triu(1).bool()]
    assert (pairs.min(), pairs.max()) == (least, most)


def test_neurons_of_the_lookup_pass_what_is_above_a_floor_that_the_target_never_reaches():
    planted = planted_lookup(PlantedLookupShape(), 0)
    batch = Batch.everywhere(torch.arange(30)[:, None])
    inputs = clean_pass(planted.target, batch, ["Up0", "Up1"]).inputs
    for name, block in zip(("Up0", "Up1"), planted.target.blocks, strict=True):
        assert 0.5 * block.floor > block.up(inputs[name]).min() > block.floor
    block.up.weight.mul_(2)
    neurons = block.up(inputs["Up1"])
    assert neurons.min() < block.floor
    passed = block(inputs["Up1"]) - inputs["Up1"]
    torch.testing.assert_close(passed, block.down(neurons.maximum(torch.tensor(block.floor))))


def test_a_frame_has_unit_rows_that_are_independent_and_not_orthogonal():
    frame = skewed_frame(7, 9, 0.5, generator())
    torch.testing.assert_close(frame.rows.norm(dim=1), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(frame.rows @ frame.duals, torch.eye(7, dtype=torch.float64))
    assert (frame.rows @ frame.rows.t() - torch.eye(7)).abs().max() > 0.2


def test_strengths_are_spread_in_steps_of_one_ratio():
    strengths = spread_strengths(4, 8.0, generator())
    steps = strengths.sort().values
    torch.testing.assert_close(steps[1:] / steps[:-1], torch.full((3,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(steps.log().sum().exp(), torch.tensor(1.0, dtype=torch.float64))
    assert spread_strengths(1, 8.0, generator()).tolist() == [1.0]


def test_the_same_seed_plants_the_same():
    one, same, other = (TARGETS["induction"](seed) for seed in (2, 2, 3))
    assert one.slices["V1"].U.equal(same.slices["V1"].U)
    assert not one.slices["V1"].U.equal(other.slices["V1"].U)
