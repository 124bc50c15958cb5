"""Toys of sparse features: their data, their forward passes by hand, how they train, what the engine sees of them."""

from __future__ import annotations

import pytest
import torch

from spdcli.engine.forward import clean_pass
from spdcli.engine.optimise import OptimiserSettings
from spdcli.engine.target import Batch
from spdcli.errors import SpdError, UsageError
from spdcli.targets.feature_toys import TMS, ResidMLP, ResidMLPShape, TMSShape, feature_target
from spdcli.targets.feature_training import label_error, train_feature_toy
from spdcli.targets.sparse_features import (
    find_feature,
    read_features,
    single_features,
    sparse_features,
    written_features,
)
from spdcli.targets.toy_state import start_toy

CPU = torch.device("cpu")
WIDE, NARROW = ResidMLPShape(features=5, d_model=40, d_mlp=4, layers=2), TMSShape(features=4, hidden=3, identity=True)


@pytest.mark.parametrize("lowest", [0.0, -1.0])
def test_a_feature_is_on_by_itself_and_uniform(lowest):
    batch = sparse_features(20_000, 3, 0.2, lowest, torch.Generator().manual_seed(1))
    assert batch.tokens.shape == (20_000, 1, 3)
    assert batch.valid.shape == batch.looked.shape == (20_000, 1)
    on = batch.tokens[:, 0] != 0
    assert on.float().mean(0).tolist() == pytest.approx([0.2] * 3, abs=0.01)  # standard error .003
    assert (on[:, 0] & on[:, 1]).float().mean().item() == pytest.approx(0.04, abs=0.006)
    values = batch.tokens[:, 0][on]
    assert lowest <= values.min() < lowest + 0.01
    assert 0.99 < values.max() <= 1
    assert values.mean().item() == pytest.approx((1 + lowest) / 2, abs=0.02)


def test_data_is_seeded():
    draws = [sparse_features(9, 3, 0.5, 0.0, torch.Generator().manual_seed(seed)).tokens for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_an_input_is_written_as_it_is_read():
    values = read_features("0 2:-0.5", 4)
    assert values.tolist() == [0.75, 0, -0.5, 0]
    assert torch.equal(read_features(written_features(values), 4), values)
    assert single_features(2).tokens.tolist() == [[[0.75, 0]], [[0, 0.75]]]
    assert find_feature(torch.stack([values, read_features("1 2", 4)]), "2") == [(0, 0), (1, 0)]


@pytest.mark.parametrize("text", ["4", "-1", "x", "1:high", "1:nan"])
def test_what_is_no_feature_is_one_line(text):
    with pytest.raises(UsageError, match=f"no feature '{text}'"):
        read_features(text, 4)


def test_a_feature_that_is_nowhere_is_one_line():
    with pytest.raises(UsageError, match="no input has feature 1"):
        find_feature(torch.zeros(2, 3), "1")
    with pytest.raises(UsageError, match="no feature '9'"):
        find_feature(torch.zeros(2, 3), "9")


@torch.no_grad()
def test_superposition_by_hand():
    toy = TMS(TMSShape(features=3, hidden=2, identity=True))
    W = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
    toy.block.read.weight.copy_(W)
    toy.block.write.bias.copy_(torch.tensor([0.5, -3.0, 0.0]))
    toy.settle()
    # x = (1, 1, 0): W x = (3, 1); Wᵀ W x = (3, 7, -1), plus b, and its negative part cut off.
    assert toy(torch.tensor([[[1.0, 1.0, 0.0]]])).tolist() == [[[3.5, 4.0, 0.0]]]
    assert torch.equal(toy.training_outputs(torch.tensor([1.0, 1.0, 0.0])), torch.tensor([3.5, 4.0, 0.0]))
    assert toy.labels(W) is W


@torch.no_grad()
def test_a_residual_mlp_by_hand():
    toy = ResidMLP(ResidMLPShape(features=2, d_model=2, d_mlp=1, layers=2))
    toy.embedding.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    for block in toy.blocks:
        block.read.weight.copy_(torch.tensor([[1.0, -1.0]]))
        block.write.weight.copy_(torch.tensor([[1.0], [2.0]]))
    # (3, 1) -> neuron 2 -> (5, 5) -> neuron 0 -> (5, 5); (-1, 0) -> neuron off -> itself.
    assert toy(torch.tensor([[[3.0, 1.0]], [[-1.0, 0.0]]])).tolist() == [[[5.0, 5.0]], [[-1.0, 0.0]]]
    assert toy.labels(torch.tensor([0.5, -0.5])).tolist() == [1.0, -0.5]


@pytest.mark.parametrize("make", [lambda: TMS(NARROW), lambda: ResidMLP(WIDE)])
def test_the_engine_sees_the_toy(make):
    torch.manual_seed(2)
    toy = make()
    target = feature_target(toy)
    batch = sparse_features(7, toy.features, 0.5, toy.lowest, torch.Generator().manual_seed(3))
    clean = clean_pass(target, batch, target.matrices)
    torch.testing.assert_close(clean.outputs, toy(batch.tokens)[:, 0])
    for name, read in toy.reads().items():
        if target.matrices[name].block == 0:
            torch.testing.assert_close(clean.inputs[name], batch.tokens @ read)
    assert set(toy.routes()) == set(target.matrices)


def test_the_names_of_matrices_stand_in_the_order_of_execution():
    assert list(TMS(NARROW).modules_by_matrix()) == ["W", "I", "WT"]
    assert list(ResidMLP(WIDE).modules_by_matrix()) == ["W_in0", "W_out0", "W_in1", "W_out1"]


@torch.no_grad()
def test_routes_lead_to_features_and_back():
    """What W promotes of a feature is its row of Wᵀ W; what WT reads of one is its column."""
    toy = TMS(TMSShape(features=3, hidden=2, identity=True))
    W = toy.block.read.weight.t()  # [F, m]
    routes = toy.routes()
    torch.testing.assert_close(routes["W"].out(W), W @ W.t())
    torch.testing.assert_close(routes["I"].into(torch.eye(2)), W)
    torch.testing.assert_close(routes["WT"].into(torch.eye(2)), W)
    mlp = ResidMLP(ResidMLPShape(features=3, d_model=6, d_mlp=2, layers=1))
    read, write = mlp.blocks[0].read.weight, mlp.blocks[0].write.weight
    torch.testing.assert_close(mlp.routes()["W_in0"].out(torch.eye(2)), write.t())
    torch.testing.assert_close(mlp.routes()["W_out0"].into(torch.eye(2)), read.t())


def trained(make, probability, rate=0.01, steps=300, seed=0):
    settings = OptimiserSettings("adamw", rate, 0.01, "constant", 0, steps)
    toy, state = start_toy(make, settings, seed, CPU)
    return toy, [record for record in train_feature_toy(toy, state, probability, 64, steps, 100) if record]


def test_training_makes_the_error_small_and_ties_superposition():
    toy, records = trained(lambda: TMS(NARROW), 0.2)
    assert [record["step"] for record in records] == [1, 100, 200, 300]
    assert records[-1]["loss"] < 0.3 * records[0]["loss"]
    assert torch.equal(toy.block.write.weight, toy.block.read.weight.t())
    assert torch.equal(toy.block.middle.weight, torch.eye(3))
    nothing = sparse_features(20_000, 4, 0.2, 0.0, torch.Generator().manual_seed(4)).tokens.square().mean()
    assert label_error(toy, 0.2, torch.Generator().manual_seed(4)) < 0.5 * nothing


@pytest.mark.parametrize("seed", range(5))
def test_no_seed_of_superposition_is_left_with_dead_outputs(seed):
    make = lambda: TMS(TMSShape(features=5, hidden=2))  # noqa: E731
    toy = trained(make, 0.05, rate=0.005, steps=600, seed=seed)[0]
    answers = toy(single_features(5).tokens)[:, 0].diagonal()
    assert bool((answers > 0.1).all()), answers


def test_training_leaves_the_embedding_and_is_seeded():
    first, again, other = (trained(lambda: ResidMLP(WIDE), 0.2, steps=20, seed=seed) for seed in (1, 1, 2))
    assert first[1] == again[1] != other[1]
    torch.manual_seed(1)
    assert torch.equal(first[0].embedding, ResidMLP(WIDE).embedding)
    torch.testing.assert_close(first[0].embedding.norm(dim=1), torch.ones(5))


def test_a_loss_that_is_not_finite_stops_with_one_line():
    with pytest.raises(SpdError, match=r"^training the toy: the loss is (nan|inf) at step"):
        trained(lambda: ResidMLP(WIDE), 0.5, rate=1e30)


def test_vectors_make_a_batch():
    batch = Batch.everywhere(torch.zeros(3, 2, 5))
    assert batch.valid.shape == (3, 2)
    assert bool(batch.looked.all())
