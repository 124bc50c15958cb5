"""Curves of rank worked out on models whose weights are changed by hand, one candidate at a time (Algorithm 2)."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import torch
from small_runs import loud_toy, toy_recipe

from spdcli.engine.forward import clean_pass
from spdcli.measures.rank_curves import (
    curve_data,
)
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import toy_subject

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
