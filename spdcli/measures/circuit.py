"""How the induction circuit works, in the target and in its slices (section 6.1).

    attention   m attends to s1, then s2 to m; the first with and without position encodings before the query
    offsets     which slice of K0 aligns token n with position n + 1
    identity    how many directions of V1 it takes to tell the tokens apart
    importance  where the gates turn slices on, by position class and by distance from s1

Letters: B sequences, T positions, D width, C slices, N vocabulary. Everything here is about the paper's toy:
two layers of one head each, attention alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spdcli.measures.circuit_data import CircuitData
from spdcli.measures.evaluation import attention_patterns
from spdcli.targets.sequences import POSITION_CLASSES

SEQUENCES = 1024
REACH = 8  # offsets and distances are told up to this many positions either way
DIRECTIONS = 16  # how far the decoding of tokens is followed


@torch.no_grad()
def circuit(data: CircuitData) -> dict[str, Any]:
    """The mechanism as numbers: `{sequences, attention, offsets, identity, importance}`.

    `offsets` is None unless Q0 and K0 are decomposed, `identity` unless V1 is.
    """
    decomposed = data.decomposition.names
    return {
        "sequences": len(data.rows),
        "attention": {kind: circuit_attention(data, kind == "masked") for kind in ("target", "masked")},
        "offsets": offset_profiles(data) if {"Q0", "K0"} <= set(decomposed) else None,
        "identity": identity(data) if "V1" in decomposed else None,
        "importance": importance_profile(data),
    }


def circuit_attention(data: CircuitData, masked: bool) -> dict[str, float]:
    """Mean attention probabilities of the circuit's two steps, in the target or in the model of active slices alone.

    `m_to_s1` with everything; then without the position encodings in what Q0 reads at m
    (`m_to_s1_unplaced_query`, the paper's 1.0 to 0.0941), also without them on s1's key
    (`m_to_s1_unplaced_query_and_s1`), and without them on any key (`m_to_s1_content_only`). The masks stay those of
    the unchanged sequence. `s2_to_m` is the second step's.
    """
    batch, at, rows = data.clean.batch, data.at, data.rows
    placed = data.clean.inputs["Q0"]
    content = data.block(0).norm(data.toy.embed(batch.tokens))
    half = torch.where(batch.classes["s1"][..., None], content, placed)

    def to_s1(query: Tensor, key: Tensor) -> float:
        q, k = data.product("Q0", query, masked), data.product("K0", key, masked)
        pattern = data.block(0).scores(q, k).log_softmax(-1)
        return pattern[rows, 0, at["m"], at["s1"]].exp().mean().item()

    original, replaced = attention_patterns(data.toy, data.target, data.decomposition, data.clean, data.g)
    second = (replaced if masked else original)[1]
    return {
        "m_to_s1": to_s1(placed, placed),
        "m_to_s1_unplaced_query": to_s1(content, placed),
        "m_to_s1_unplaced_query_and_s1": to_s1(content, half),
        "m_to_s1_content_only": to_s1(content, content),
        "s2_to_m": second[rows, 0, at["s2"], at["m"]].exp().mean().item(),
    }


def by_offset(scores: Tensor, offsets: Sequence[int]) -> list[float]:
    """Mean of `scores[n', n]` `[T, T]` over all pairs with query n' and key n at each offset `n' - n`."""
    return [torch.diagonal(scores, -offset).mean().item() for offset in offsets]


def offset_profiles(data: CircuitData) -> dict[str, Any]:
    """What the encodings alone say: how well the query of position n' matches the key of position n, by `n' - n`.

    For a slice c of K0 the key of position n is `(p_n U_c) V_c` and the query of n' is `p_n' W_Q0`; for a slice of Q0
    the other way round with `p_n W_K0`. Scores are what softmax gets (over the root of the head width). A matrix
    that finds the previous token peaks at +1; a slice is one product of a function of n and one of n', and can do
    that only as far as they rise and fall together. `cosine` is the mean of cos(key(n), query(n + 1));
    `contrast` the score at +1 less the mean over other offsets from 0 on; `aligns` the K0 slice where it is largest.
    """
    positions = data.toy.positions
    length, root = positions.shape[0], math.sqrt(data.toy.shape.d_model)
    reach = min(REACH, length - 1)
    offsets = list(range(-reach, reach + 1))
    queries, keys = positions @ data.target.matrices["Q0"].weight, positions @ data.target.matrices["K0"].weight

    def profile(query: Tensor, key: Tensor) -> dict[str, Any]:
        scores = query @ key.t() / root
        past = by_offset(scores, range(length))
        others = [value for offset, value in enumerate(past) if offset != 1]
        return {
            "scores": by_offset(scores, offsets),
            "peak": max(range(length), key=past.__getitem__),
            "contrast": past[1] - sum(others) / len(others),
            "cosine": F.cosine_similarity(key[:-1], query[1:], dim=1).mean().item(),
        }

    slices = []
    for name in ("Q0", "K0"):
        own = data.decomposition.of(name)
        for c in data.active[name]:
            made = (positions @ own.U[:, c : c + 1]) @ own.V[c : c + 1]
            pair = (made, keys) if name == "Q0" else (queries, made)
            slices.append({"slice": f"{name}:{c}", "reads": reads(data, own.U[:, c])} | profile(*pair))
    of_keys = [entry for entry in slices if entry["slice"].startswith("K0")]
    best = max(of_keys, key=lambda entry: entry["contrast"], default=None)
    return {
        "offsets": offsets,
        "whole": profile(queries, keys),
        "slices": slices,
        "aligns": None if best is None else best["slice"],
    }


def reads(data: CircuitData, u: Tensor) -> dict[str, Any]:
    """What a slice with read direction u gets from the s token, from ordinary tokens and from the encodings.

    Inner activations `x . u`: one number for s, mean and standard deviation over tokens and over positions. A slice
    that reads a position has a large deviation there; one that only notices that a position is there has none.
    """
    tokens, places = data.toy.embed.weight @ u, data.toy.positions @ u
    spread = lambda values: {"mean": values.mean().item(), "std": values.std(correction=0).item()}  # noqa: E731
    return {"s": tokens[-1].item(), "tokens": spread(tokens[:-1]), "positions": spread(places)}


def identity(data: CircuitData) -> dict[str, Any]:
    """How V1 carries m's identity to s2.

    `singular_values` of the active part of `U V` and, for comparison, of W; their participation ratio
    `(sum s^2)^2 / sum s^4` and how many exceed 1 % of the largest. `decoding[k - 1]` is the share of sequences whose
    m is the token nearest by the toy's own unembedding when s2 gets from m the first k principal directions
    of what the masked V1 writes there, and nothing else.
    """
    own, active = data.decomposition.of("V1"), data.active["V1"]
    weight = data.target.matrices["V1"].weight
    values = torch.linalg.svdvals(own.U[:, active] @ own.V[active])
    squares = values.square()
    written = data.product("V1", data.clean.inputs["V1"], masked=True)[data.rows, data.at["m"]]
    base = data.clean.entries[-1][data.rows, data.at["s2"]]
    directions = torch.linalg.svd(written, full_matrices=False).Vh
    answers = data.clean.batch.answers
    assert answers is not None
    decoding = []
    for k in range(1, min(DIRECTIONS, len(directions)) + 1):
        arriving = base + (written @ directions[:k].t()) @ directions[:k]
        decoding.append(_guessed(data, arriving).eq(answers).float().mean().item())
    return {
        "singular_values": values.tolist(),
        "singular_values_target": torch.linalg.svdvals(weight).tolist(),
        "participation": (squares.sum().square() / squares.square().sum().clamp(min=1e-30)).item(),
        "above_one_percent": int((values > 0.01 * values.max()).sum()),
        "decoding": decoding,
    }


def _guessed(data: CircuitData, hidden: Tensor) -> Tensor:
    return F.linear(data.target.finish(hidden), data.target.unembedding).argmax(-1)


def importance_profile(data: CircuitData) -> dict[str, Any]:
    """Summed importances of each matrix: mean by position class, and by distance from s1 (s2 left out)."""
    classes, length = data.clean.batch.classes, data.clean.batch.tokens.shape[1]
    distances = list(range(max(-REACH, 3 - length), min(REACH, length - 2) + 1))  # s1 stands at T - 3 at the latest
    place = torch.arange(length, device=data.rows.device) - data.at["s1"][:, None]  # [B, T]
    inner = ~classes["s2"]
    found: dict[str, Any] = {"distances": distances, "classes": {}, "by_distance": {}}
    for name, g in data.g.items():
        total = g.sum(-1)
        found["classes"][name] = {kind: total[classes[kind]].mean().item() for kind in POSITION_CLASSES}
        found["by_distance"][name] = [total[inner & (place == d)].mean().item() for d in distances]
    return found


@torch.no_grad()
def example(data: CircuitData) -> dict[str, Any]:
    """One sequence to draw, its s1 about in the middle: `{tokens, at: {s1, m, s2}, target, masked}`.

    `target` and `masked` are the attention probabilities `[T, T]` of both layers, in the target and in the model of
    active slices alone.
    """
    length = data.clean.batch.tokens.shape[1]
    row = int((data.at["s1"] - length // 2).abs().argmin())
    original, masked = attention_patterns(data.toy, data.target, data.decomposition, data.clean, data.g)
    return {
        "tokens": data.clean.batch.tokens[row].tolist(),
        "at": {kind: int(places[row]) for kind, places in data.at.items()},
        "target": [pattern[row, 0].exp().cpu().numpy() for pattern in original],
        "masked": [pattern[row, 0].exp().cpu().numpy() for pattern in masked],
    }
