"""Do two decompositions find the same slices? Similarities of slices, the best assignment, a stability score each.

Two decompositions of one toy share a basis, and their slices are compared as weights: |cos(u (x) v, u' (x) v')|.
Different toys have different bases, so that weights cannot be compared; what slices do can. The *effect* of a slice is
what it alone adds, masked by its importance, to the quantity its matrix feeds where the circuit reads it, on the same
sequences of tokens for every toy:

    Q0, K0      attention scores of m's query in the first layer, by key
    V0, Q1, K1  attention scores of s2's query in the second layer, by key
    V1          logits at s2, by token

everything else as in the target. Softmax does not see a constant, so that effects have mean 0 over keys (tokens).
Two slices are as similar as |cos| of their effects over all sequences: no basis and no scale takes part.
Slices that are active nowhere do nothing and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spdcli.measures.circuit_data import CircuitData
from spdcli.measures.slice_similarity import Signature, match


class Match(NamedTuple):
    """The partner of a slice in another run (counted from 0), or None there, and their similarity."""

    run: int
    slice: str | None
    similarity: float


@dataclass(frozen=True, kw_only=True)
class SliceScore:
    """How well a slice of one run, `matrix:index`, is found again: `score` is the mean similarity to its partners in
    the other runs, 0 in a run that has none for it."""

    run: int
    slice: str
    score: float
    matches: list[Match]


def stability(runs: Sequence[dict[str, Signature]]) -> list[SliceScore]:
    """How well each run's slices are found again in the other runs; needs at least two. One score a slice."""
    matches: dict[tuple[int, str, int], list[Match]] = {}
    for a in range(len(runs)):
        for b in range(a + 1, len(runs)):
            for name in runs[a].keys() & runs[b].keys():
                pairs = match(runs[a][name], runs[b][name])
                back = {partner: (label, score) for label, (partner, score) in pairs.items()}
                for run, other, partners in ((a, b, pairs), (b, a, back)):
                    for label in runs[run][name].labels:
                        partner, score = partners.get(label, (None, 0.0))
                        address = None if partner is None else f"{name}:{partner}"
                        matches.setdefault((run, name, label), []).append(Match(other, address, score))
    return [
        SliceScore(run=run, slice=f"{name}:{label}", score=sum(m.similarity for m in own) / len(own), matches=own)
        for (run, name, label), own in sorted(matches.items())
    ]


@torch.no_grad()
def effect_signatures(data: CircuitData) -> dict[str, Signature]:
    """Effects of the active slices of every decomposed matrix (module docstring), `[n, B * T]` or `[n, B * N]`."""
    signatures = {}
    for name in data.decomposition.names:
        effect = _logit_effects(data) if name == "V1" else _score_effects(data, name)
        signatures[name] = Signature(data.active[name], (effect.flatten(1).cpu(),))
    return signatures


def _masked_inner(data: CircuitData, name: str) -> Tensor:
    """`g (x . u)` of the active slices of a matrix at every position, `[n, B, T]`."""
    active = data.active[name]
    inner = data.clean.inputs[name] @ data.decomposition.of(name).U[:, active]
    return (inner * data.g[name][..., active]).movedim(-1, 0)


def _score_effects(data: CircuitData, name: str) -> Tensor:
    """What slices of Q0, K0, V0, Q1 or K1 add to the scores of the query that matters, by key: `[n, B, T]`."""
    layer = 0 if name in ("Q0", "K0") else 1
    query_at = data.at["m" if layer == 0 else "s2"]
    rows = data.rows
    inner = _masked_inner(data, name)
    written = data.decomposition.of(name).V[data.active[name]]  # [n, D]
    if name.startswith("Q"):
        keys = data.projection(f"K{layer}")  # [B, T, D]
        scores = inner[:, rows, query_at, None] * torch.einsum("nd,btd->nbt", written, keys)
    else:
        query = data.projection(f"Q{layer}")[rows, query_at]  # [B, D]
        if name == "V0":
            pattern = _target_pattern(data, 0)
            inner = torch.einsum("bij,nbj->nbi", pattern, inner)
            written = written @ data.target.matrices["K1"].weight
        scores = inner * (written @ query.t())[..., None]
    seen = torch.arange(scores.shape[-1], device=rows.device) <= query_at[:, None]  # [B, T]
    mean = (scores * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    return (scores - mean) * seen / math.sqrt(data.toy.shape.d_model)


def _logit_effects(data: CircuitData) -> Tensor:
    """What slices of V1 add to the logits at s2, `[n, B, N]`."""
    to_s2 = _target_pattern(data, 1)[data.rows, data.at["s2"]]  # [B, T]
    arriving = torch.einsum("bt,nbt->nb", to_s2, _masked_inner(data, "V1"))
    logits = data.decomposition.of("V1").V[data.active["V1"]] @ data.target.unembedding.t()  # [n, N]
    return arriving[..., None] * (logits - logits.mean(-1, keepdim=True))[:, None]


def _target_pattern(data: CircuitData, layer: int) -> Tensor:
    """The target's attention probabilities `[B, T, T]` in a layer (one head)."""
    q, k = (data.projection(f"{letter}{layer}") for letter in "QK")
    return data.block(layer).scores(q, k).softmax(-1)[:, 0]
