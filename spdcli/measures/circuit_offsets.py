"""Which slice of K0 aligns token n with position n + 1: the first step of the circuit, by encodings (section 6.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spdcli.measures.circuit_data import REACH, CircuitData


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of inner activations `x . u`."""

    mean: float
    std: float


@dataclass(frozen=True)
class Reading:
    """The inner activations `x . u` that a slice with read direction u gets from the toy's inputs, part by part.

    One number for the `s` token; mean and deviation over ordinary `tokens` and over the encodings of `positions`. A
    slice that reads a position has a large deviation there; one that only notices that a position is there has none.
    """

    s: float
    tokens: Spread
    positions: Spread


@dataclass(frozen=True)
class OffsetProfile:
    """How well queries match keys by the encodings alone, by offset (the query's position less the key's).

    `scores` are means over all pairs at each of the offsets looked at, as softmax gets them (over the root of the head
    width). `peak` is the offset from 0 on with the highest one, `contrast` the score at +1 less the mean over the
    other offsets from 0 on, `cosine` the mean of cos(key(n), query(n + 1)).
    """

    scores: Sequence[float]
    peak: int
    contrast: float
    cosine: float


@dataclass(frozen=True)
class SliceOffsets:
    """One slice of Q0 or K0: its address, what it reads, and its profile as in `OffsetProfile`."""

    slice: str
    reads: Reading
    scores: Sequence[float]
    peak: int
    contrast: float
    cosine: float


@dataclass(frozen=True)
class Offsets:
    """Profiles over `offsets`: of Q0 and K0 as they are (`whole`), and of each of their active slices in their place.

    `aligns` is the slice of K0 with the largest contrast; None where none is active, or none reads a position.
    """

    offsets: Sequence[int]
    whole: OffsetProfile
    slices: Sequence[SliceOffsets]
    aligns: str | None


def offset_profiles(data: CircuitData) -> Offsets:
    """What the encodings alone say: how well the query of position n' matches the key of position n, by `n' - n`.

    For a slice c of K0 the key of position n is `(p_n U_c) V_c` and the query of n' is `p_n' W_Q0`; for a slice of Q0
    the other way round with `p_n W_K0`. A matrix that finds the previous token peaks at +1; a slice is one product of
    a function of n and one of n', and can do that only as far as they rise and fall together.

    Where encodings are added after Q and K no slice reads a position: they match each other as they are, whatever is
    learned, and `slices` is empty.
    """
    positions = data.toy.positions
    reach = min(REACH, positions.shape[0] - 1)
    offsets = list(range(-reach, reach + 1))
    if data.block(0).after:
        return Offsets(offsets, _profile(data, positions, positions, offsets), [], None)
    queries, keys = positions @ data.target.matrices["Q0"].weight, positions @ data.target.matrices["K0"].weight
    slices = []
    for name in ("Q0", "K0"):
        own = data.decomposition.of(name)
        for c in data.active[name]:
            written = (positions @ own.U[:, c : c + 1]) @ own.V[c : c + 1]
            pair = (written, keys) if name == "Q0" else (queries, written)
            profile = _profile(data, *pair, offsets)
            slices.append(SliceOffsets(f"{name}:{c}", reading(data, own.U[:, c]), **vars(profile)))
    of_keys = [one for one in slices if one.slice.startswith("K0")]
    best = max(of_keys, key=lambda one: one.contrast, default=None)
    whole = _profile(data, queries, keys, offsets)
    return Offsets(offsets, whole, slices, None if best is None else best.slice)


def _profile(data: CircuitData, query: Tensor, key: Tensor, offsets: Sequence[int]) -> OffsetProfile:
    """Of queries and keys `[T, D]`, each by position."""
    scores = query @ key.t() / math.sqrt(data.toy.shape.d_model)
    past = by_offset(scores, range(len(scores)))
    others = [value for offset, value in enumerate(past) if offset != 1]
    return OffsetProfile(
        scores=by_offset(scores, offsets),
        peak=max(range(len(past)), key=past.__getitem__),
        contrast=past[1] - sum(others) / len(others),
        cosine=F.cosine_similarity(key[:-1], query[1:], dim=1).mean().item(),
    )


def by_offset(scores: Tensor, offsets: Sequence[int]) -> list[float]:
    """Mean of `scores[n', n]` `[T, T]` over all pairs with query n' and key n at each offset `n' - n`."""
    return [torch.diagonal(scores, -offset).mean().item() for offset in offsets]


def reading(data: CircuitData, u: Tensor) -> Reading:
    """What a slice with read direction u `[D]` gets from the s token, from ordinary tokens and from the encodings."""
    s = data.toy.shape.vocabulary
    tokens, places = data.toy.embed.weight @ u, data.toy.positions @ u
    return Reading(tokens[s].item(), _spread(tokens[:s]), _spread(places))


def _spread(values: Tensor) -> Spread:
    return Spread(values.mean().item(), values.std(correction=0).item())
