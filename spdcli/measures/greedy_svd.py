"""Greedy SVD pruning, plain and weighted by what the matrices read (Algorithm 2 in A.2.3; the baselines of Figure 2).

    greedy_svd      W = U S V; the smallest singular value of some matrix goes, a round at a time (Algorithm 2)
    weighted_svd    the same on singular triples that are weighted by the matrix's inputs on the data

Rank is the matrices' own, summed. The run's slices, which these are set against, are in `rank_curves.py`, and all
methods together in `svd.py`. I d_in, O d_out, C singular triples of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.masks import chunk_masks
from spdcli.engine.replacement import replaced
from spdcli.engine.subcomponents import Slices, SliceSet
from spdcli.engine.variants import Piece, fixed_variant
from spdcli.measures.rank_curves import CurveData, Point, Rounds

ROUNDS = 128  # of a greedy method by default, or four a matrix where that is more
SPAN_CUTOFF = 1e-5  # of the largest singular value of the inputs: below it, the data does not go that way


def plain_triples(weight: Tensor) -> Slices:
    """All singular triples of `weight` `[I, O]` as slices, the largest first, up to its numerical rank.

    Numerical rank: singular values above `eps * max(I, O)` times the largest; eps is the weight's own precision,
    float32's for half precision.
    """
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return _as_slices(left, values, right, weight)


def weighted_triples(weight: Tensor, inputs: Tensor) -> Slices:
    """The triples of `C^(1/2) W = L S R` taken back through `C^(-1/2)`, with C the second moment of `inputs` `[n, I]`.

    The first r of them are the matrix of rank r that minimises `‖X (W - W_r)‖` over the inputs X. With
    `X / sqrt(n) = A s B^T`, C^(1/2) is `B s B^T`, so that only `s B^T W` is decomposed. The root is inverted as a
    pseudo-inverse, without a ridge: directions whose s is below `SPAN_CUTOFF` of the largest count as never read,
    and no triple reads them. Numerical rank as for `plain_triples`.
    """
    _, factor = torch.linalg.qr(inputs.double() / len(inputs) ** 0.5, mode="r")
    _, scale, basis = torch.linalg.svd(factor, full_matrices=False)
    read = scale > SPAN_CUTOFF * scale.max()
    scale, basis = scale[read, None], basis[read]
    left, values, right = torch.linalg.svd(scale * (basis @ weight.double()), full_matrices=False)
    return _as_slices(basis.t() @ (left / scale), values, right, weight)


def _as_slices(left: Tensor, values: Tensor, right: Tensor, weight: Tensor) -> Slices:
    precision = torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps
    largest = values.max() if len(values) else 0.0
    rank = int((values > precision * max(weight.shape) * largest).sum())
    root = values[:rank].sqrt()
    return Slices((left[:, :rank] * root).to(weight.dtype), (root[:, None] * right[:rank]).to(weight.dtype))


def plain_set(data: CurveData) -> SliceSet:
    """`plain_triples` of every matrix of the run."""
    return SliceSet({name: plain_triples(data.target.matrices[name].weight) for name in data.names}, delta=False)


def weighted_set(data: CurveData) -> SliceSet:
    """`weighted_triples` of every matrix of the run, C over all real positions of the data."""
    triples = {}
    for name in data.names:
        inputs = torch.cat([clean.inputs[name][clean.batch.valid] for clean in data.cleans])
        triples[name] = weighted_triples(data.target.matrices[name].weight, inputs)
    return SliceSet(triples, delta=False)


def default_step(total_rank: int, matrices: int) -> int:
    """Singular values a round for about ROUNDS rounds, or four rounds a matrix; 1 is Algorithm 2 to the letter."""
    return max(1, -(-total_rank // max(ROUNDS, 4 * matrices)))


def greedy(data: CurveData, slices: SliceSet, step: int | None, report: Rounds) -> list[Point]:
    """Algorithm 2 (A.2.3), continued beyond its tolerance until every rank is 0; `within` says where it would stop.

    In the listing, lines 10 to 16 are indented into the loop over matrices. To pick the j of the lowest loss takes
    all L_i of a round, so they are read as standing after that loop, and `break` as the end of the algorithm. Of
    equal losses the first matrix in order of execution is taken. A candidate loses `step` values at once (all that
    it has where that is less; None is `default_step`). A matrix that has not lost any is the target's own.
    """
    ranks = {name: slices.of(name).U.shape[1] for name in slices.names}
    step = step or default_step(sum(ranks.values()), len(ranks))
    rounds = sum(-(-rank // step) for rank in ranks.values())
    curve = [Point(dict(ranks), 0.0)]
    for done in range(rounds):
        report(done, rounds)
        losses = _candidate_losses(data, slices, ranks, step)
        best = min(losses, key=losses.__getitem__)
        ranks[best] = max(0, ranks[best] - step)
        curve.append(Point(dict(ranks), losses[best]))
    return curve


def _candidate_losses(data: CurveData, slices: SliceSet, ranks: Mapping[str, int], step: int) -> dict[str, float]:
    """The mean KL of every candidate of a round, by the matrix that it takes `step` values from: one plan.

    Before the block of its matrix a candidate is the model as pruned so far. That one runs once, and the candidate
    enters there, as a copy of its hidden state.
    """
    blocks = data.blocks
    pruned = {n: _largest(slices, n, rank) for n, rank in ranks.items() if rank < slices.of(n).U.shape[1]}
    candidates = []
    for name in (name for name, rank in ranks.items() if rank > 0):
        masks = {other: mask for other, mask in pruned.items() if blocks[other] >= blocks[name]}
        masks[name] = _largest(slices, name, max(0, ranks[name] - step))
        candidates.append(fixed_variant(name, masks, blocks, delta=0.0))
    candidates.sort(key=lambda variant: variant.entry)
    starts = (_pruned_pass(data, slices, clean, pruned) for clean in data.cleans)
    return data.mean_kl([data.kl_sums(slices, start, candidates, {}) for start in starts])


def _largest(slices: SliceSet, name: str, rank: int) -> Tensor:
    """The mask `[C]` of the first `rank` triples of a matrix."""
    U = slices.of(name).U
    return (torch.arange(U.shape[1], device=U.device) < rank).to(U.dtype)


def _pruned_pass(data: CurveData, slices: SliceSet, clean: Clean, masks: Mapping[str, Tensor]) -> Clean:
    """`clean` with the hidden states of the model that `masks` cut; the predictions in it stay the target's."""
    if not masks:
        return clean
    whole = [Piece(fixed_variant("pruned", masks, data.blocks, delta=0.0), 0, len(clean.batch.tokens))]
    with replaced(data.target, slices, chunk_masks(whole, slices, {})):
        ran = clean_pass(data.target, clean.batch, ())
    return replace(clean, entries=ran.entries, calls=ran.calls)
