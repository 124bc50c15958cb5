"""The toy: positions, causality, names and orientation of its matrices, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from twins import close

from spdcli.engine.forward import clean_pass
from spdcli.engine.optimise import OptimiserSettings
from spdcli.engine.target import Batch
from spdcli.errors import SpdError
from spdcli.targets.induction import InductionToy, ToyShape, sinusoids, toy_accuracy, toy_target, train_toy
from spdcli.targets.toy_state import start_toy

EVERYTHING = {"layer_norm": True, "feed_forward": True, "output_projection": True, "heads": 2}
SHAPES = pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["paper", "everything"])


def toy(**options):
    torch.manual_seed(0)
    return InductionToy(ToyShape(**{"d_model": 8, "vocabulary": 10, "length": 6} | options)).double()


def some_tokens(count=3, length=6):
    return torch.randint(11, (count, length), generator=torch.Generator().manual_seed(1))


def test_sinusoids_by_hand():
    table = sinusoids(3, 4)
    # Frequencies 1 and 10000^(-2/4) = 0.01, sines in even columns.
    expected = [[math.sin(t), math.cos(t), math.sin(0.01 * t), math.cos(0.01 * t)] for t in range(3)]
    torch.testing.assert_close(table, torch.tensor(expected))
    assert sinusoids(5, 3).shape == (5, 3)


@SHAPES
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_block_is_attention_head_by_head(options, place):
    """A literal block: one query at a time, positions in what Q and K read, or in what they write."""
    model = toy(**options, positions=place)
    block, heads = model.blocks[0], model.shape.heads
    stream = model.embed(some_tokens(1))[0]
    read = torch.nn.functional.layer_norm(stream, (8,)) if options else stream
    read_by, written = (model.positions, 0) if place == "before" else (0, model.positions)
    q, k = ((read + read_by) @ w.weight.t() + written for w in (block.q, block.k))
    v = read @ block.v.weight.t()
    mixed = torch.zeros_like(stream)
    width = 8 // heads
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        for i in range(6):
            weights = (k[: i + 1, own] @ q[i, own] / math.sqrt(width)).softmax(0)
            mixed[i, own] = weights @ v[: i + 1, own]
    expected = stream + (mixed @ block.o.weight.t() if options else mixed)
    if options:
        read = torch.nn.functional.layer_norm(expected, (8,))
        expected = expected + (read @ block.up.weight.t()).clamp(min=0) @ block.down.weight.t()
    close(block(stream[None], model.positions[None])[0], expected)
    close(block(stream[None], model.positions[None], last=True)[0], expected[-1:])


@SHAPES
def test_the_toy_is_causal(options):
    model, tokens = toy(**options), some_tokens()
    later = tokens.clone()
    later[:, 4:] = (later[:, 4:] + 1) % 11
    before, after = model.stream(tokens), model.stream(later)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(-1).all()


def without_attention_scores(positions):
    """One block whose attention is uniform: an order can only show through the stream or the values."""
    model = toy(layers=1, positions=positions)
    model.blocks[0].q.weight.data.zero_()
    return model


def test_shortformer_streams_and_values_carry_no_position():
    tokens = some_tokens()
    shuffled = tokens[:, [2, 0, 4, 1, 3, 5]]
    model = without_attention_scores("before")
    close(model.logits(tokens), model.logits(shuffled))
    added = without_attention_scores("added")
    assert (added.stream(tokens)[:, 0] != model.stream(tokens)[:, 0]).any()  # positions that are added do show
    assert not torch.allclose(
        added.blocks[0].v(added.embed(tokens) + added.positions), model.blocks[0].v(model.embed(tokens))
    )


def test_encodings_after_the_projections_are_in_no_matrixs_input():
    tokens = some_tokens()
    model = toy(positions="after")
    clean = clean_pass(target := toy_target(model), Batch(tokens, tokens >= 0, tokens >= 0), target.matrices)
    for name in ("Q0", "K0", "V0"):
        close(clean.inputs[name], model.embed(tokens))
    assert not torch.allclose(model.logits(tokens), model.logits(tokens[:, [2, 0, 4, 1, 3, 5]]))


def test_shortformer_queries_and_keys_do_carry_position():
    tokens = some_tokens()
    clean = clean_pass(target := toy_target(toy()), Batch(tokens, tokens >= 0, tokens >= 0), target.matrices)
    stream = target.model.embed(tokens)
    close(clean.inputs["V0"], stream)
    for name in ("Q0", "K0"):
        close(clean.inputs[name], stream + target.model.positions)
    assert not torch.allclose(toy().logits(tokens), toy().logits(tokens[:, [2, 0, 4, 1, 3, 5]]))


@pytest.mark.parametrize(
    ("options", "letters"),
    [
        ({}, ["Q", "K", "V"]),
        ({"output_projection": True}, ["Q", "K", "V", "O"]),
        ({"feed_forward": True}, ["Q", "K", "V", "Up", "Down"]),
        (EVERYTHING, ["Q", "K", "V", "O", "Up", "Down"]),
    ],
)
def test_matrices_are_named_as_in_table_1_and_turned_right(options, letters):
    target = toy_target(toy(**options))
    assert list(target.matrices) == [f"{letter}{layer}" for layer in (0, 1) for letter in letters]
    for name, matrix in target.matrices.items():
        assert matrix.block == int(name[-1])
        assert matrix.weight.shape == (matrix.d_in, matrix.d_out)
        x = torch.randn(2, matrix.d_in, dtype=torch.float64)
        close(x @ matrix.weight, matrix.module(x))
    if "Up" in letters:
        assert (target.matrices["Up0"].d_in, target.matrices["Up0"].d_out) == (8, 32)
    assert not any(parameter.requires_grad for parameter in target.model.parameters())


def train(steps=500, rate=2e-2, seed=0, **options):
    shape = ToyShape(**{"d_model": 16, "vocabulary": 6, "length": 8} | options)
    settings = OptimiserSettings("adamw", rate, 0.01, "cosine", 20, steps)
    toy, state = start_toy(lambda: InductionToy(shape), settings, seed, torch.device("cpu"))
    return toy, [record for record in train_toy(toy, state, 64, steps, log_every=100) if record]


def test_a_small_toy_learns_induction():
    model, log = train(steps=800)
    assert [record["step"] for record in log] == [1, *range(100, 801, 100)]
    first, last = log[0], log[-1]
    assert first["loss"] > 1.5  # about ln 6 = 1.8, a guess among six
    assert last["loss"] < 0.2
    assert toy_accuracy(model, 2000, torch.Generator().manual_seed(9)) > 0.95


def test_training_is_seeded():
    runs = [train(steps=30, seed=seed)[1][-1]["loss"] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_training_that_diverges_says_where():
    with pytest.raises(SpdError, match=r"the loss is nan at step \d+"):
        train(steps=30, rate=1e25)


def test_the_last_position_alone_is_the_same_as_the_last_of_all():
    model = toy(length=9, heads=2, layer_norm=True, feed_forward=True, output_projection=True)
    tokens = torch.randint(7, (3, 9))
    close(model.stream(tokens, last=True), model.stream(tokens)[:, -1:])
    close(model(tokens)[:, -1], model.logits(tokens))
