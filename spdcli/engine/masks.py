"""The masks of a plan: what each variant multiplies the slices of a matrix by (Algorithm 3, line 4).

A mask lies between the importance g of its slice and 1. A *source* (a row of `tables.SOURCES`) says where: it gives a
number in [0, 1] for every mask, 0 for g itself and 1 for 1, and the mask is `g + (1 - g) * number`.
Letters: R rows of a chunk, r of them in which a matrix is replaced, B sequences, T positions, C slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from spdcli.engine.product import MaskedRows
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.tables import SOURCES
from spdcli.engine.target import sent
from spdcli.engine.variants import Piece


class Noise:
    """Uniform numbers for stochastic masks, from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, out: Tensor, piece: Piece, name: str, kind: str) -> None:
        """Fill `out` with uniform numbers for matrix `name` of `piece`; `kind` is mask or delta."""
        out.uniform_(generator=self.generator)


# A source fills `out` with numbers in [0, 1] for matrix `name` on the n sequences of `piece`: where `kind` is "mask",
# `[n, T, C]`, how far each mask is moved from g to 1; where it is "delta", `[n, T, 1]`, the delta's masks.
Fill = Callable[[Tensor, Piece, str, str, Noise | None], None]


def unmoved(out: Tensor, piece: Piece, name: str, kind: str, noise: Noise | None) -> None:
    """The source "importance": masks are g itself (L_recon of section 4, Eq. 5), the delta is off."""
    out.zero_()


def uniform(out: Tensor, piece: Piece, name: str, kind: str, noise: Noise | None) -> None:
    """The source "stochastic": masks from U(g, 1), the delta's from U(0, 1) (Eq. 2)."""
    assert noise is not None
    noise(out, piece, name, kind)


def chunk_masks(
    chunk: Sequence[Piece], slices: SliceSet, g: Mapping[str, Tensor], noise: Noise | None = None
) -> dict[str, MaskedRows]:
    """The masks of a chunk of a plan: for each matrix that one of its variants replaces, on which rows and by what.

    `g[m]` `[B, T, C]` are the importances that masks start from; variants with fixed masks need neither them nor
    `noise`, and a chunk has fixed masks in all its variants or in none.
    """
    masks = {}
    for name in slices.names:
        pieces = [(first, piece) for first, piece in _numbered(chunk) if name in piece.variant.matrices]
        if not pieces:
            continue
        fixed = pieces[0][1].variant.fixed is not None
        masks[name] = _fixed_rows(pieces, name) if fixed else _drawn_rows(pieces, name, g[name], slices.delta, noise)
    return masks


def _numbered(chunk: Sequence[Piece]) -> list[tuple[int, Piece]]:
    """Every piece with the number of its first row in the chunk."""
    return list(zip(accumulate((len(piece) for piece in chunk), initial=0), chunk, strict=False))


def _drawn_rows(
    pieces: Sequence[tuple[int, Piece]], name: str, g: Tensor, delta: bool, noise: Noise | None
) -> MaskedRows:
    """The masks of matrix `name` by the sources of `pieces`, each with its first row; `g` `[B, T, C]`.

    A variant's own delta mask, where it has one, stands in place of its source's. Where a variant leaves the target
    alone both masks are 1, which is the target's own matrix.
    """
    rows = _ranges([(first, first + len(piece)) for first, piece in pieces], g)
    origin = _ranges([(piece.start, piece.stop) for _, piece in pieces], g)
    routed = any(piece.variant.routed is not None for _, piece in pieces)
    moved = any(SOURCES[piece.variant.source].code for _, piece in pieces)
    numbers = g.new_empty(len(rows), *g.shape[1:]) if moved or routed else None
    deltas = g.new_zeros(len(rows), g.shape[1], 1) if delta or routed else None
    first = 0
    for _, piece in pieces:
        part, first = slice(first, first + len(piece)), first + len(piece)
        own_numbers = None if numbers is None else numbers[part]
        own_deltas = None if deltas is None else deltas[part]
        _fill(own_numbers, own_deltas, piece, name, delta, noise)
        if piece.variant.routed is not None and own_numbers is not None and own_deltas is not None:
            left_alone = ~sent(piece.variant.routed[name][piece.start : piece.stop, :, None], g.device)
            own_numbers.masked_fill_(left_alone, 1.0)  # a number of 1 is a mask of 1
            own_deltas.masked_fill_(left_alone, 1.0)
    return MaskedRows(rows, g, deltas, origin, numbers)


def _fill(
    numbers: Tensor | None, deltas: Tensor | None, piece: Piece, name: str, delta: bool, noise: Noise | None
) -> None:
    """Fill the `numbers` `[n, T, C]` and the delta's masks `deltas` `[n, T, 1]` of a piece by its variant's source."""
    source = SOURCES[piece.variant.source]
    fill: Fill = source.load() if source.code else unmoved
    if numbers is not None:
        fill(numbers, piece, name, "mask", noise)
    if deltas is None:
        return
    if piece.variant.delta:
        deltas.fill_(piece.variant.delta)
    elif delta and source.code:  # else they are 0 already
        fill(deltas, piece, name, "delta", noise)


def _fixed_rows(pieces: Sequence[tuple[int, Piece]], name: str) -> MaskedRows:
    """The masks of matrix `name` in variants that have fixed ones: one mask a variant."""
    masks, deltas = [], []
    for _, piece in pieces:
        assert piece.variant.fixed is not None
        masks.append(piece.variant.fixed[name])
        deltas += [piece.variant.delta] * len(piece)
    mask = torch.stack(masks)[:, None]
    numbers = torch.arange(len(masks), device=mask.device)
    counts = torch.tensor([len(piece) for _, piece in pieces], device=mask.device)
    rows = _ranges([(first, first + len(piece)) for first, piece in pieces], mask)
    delta = mask.new_tensor(deltas)[:, None, None] if any(deltas) else None
    return MaskedRows(rows, mask, delta, numbers.repeat_interleave(counts, output_size=len(rows)))


def _ranges(bounds: Iterable[tuple[int, int]], like: Tensor) -> Tensor:
    """The numbers of several ranges in a row, on the device of `like`."""
    return torch.cat([torch.arange(start, stop, device=like.device) for start, stop in bounds])


def importance_masks(g: Mapping[str, Tensor], delta: bool) -> dict[str, MaskedRows]:
    """The masks of the model made of active slices alone: `g[m]` `[B, T, C]` in every row, the delta off."""
    whole = {name: torch.arange(len(mask), device=mask.device) for name, mask in g.items()}
    off = {name: mask.new_zeros(*mask.shape[:-1], 1) if delta else None for name, mask in g.items()}
    return {name: MaskedRows(whole[name], mask, off[name]) for name, mask in g.items()}
