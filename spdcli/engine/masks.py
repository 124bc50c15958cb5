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
from spdcli.engine.variants import Numbers, Piece


class Noise:
    """Uniform numbers for stochastic masks, from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, out: Tensor, piece: Piece, name: str, kind: str) -> None:
        """Fill `out` with uniform numbers for matrix `name` of `piece`; `kind` is mask or delta."""
        if not piece.before + piece.after:
            out.uniform_(generator=self.generator)
            return
        drawn = out.new_empty(piece.before + len(out) + piece.after, *out.shape[1:])
        drawn.uniform_(generator=self.generator)
        out.copy_(drawn[piece.before : piece.before + len(out)])


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


def ascended(out: Tensor, piece: Piece, name: str, kind: str, noise: Noise | None) -> None:
    """The source "adversarial": the numbers that the variant brings, which `adversary.ascend` moved."""
    numbers = _brought(piece, name)
    out.copy_((numbers.mask if kind == "mask" else numbers.delta).detach())


def _brought(piece: Piece, name: str) -> Numbers:
    """The numbers for matrix `name` that the variant of `piece` brings: of its sequences, or shared by all."""
    assert piece.variant.numbers is not None, "masks of an ascended source are found by engine.adversary"
    own = lambda tensor: tensor if len(tensor) == 1 else tensor[piece.start : piece.stop]  # noqa: E731
    return Numbers(*map(own, piece.variant.numbers[name]))


def chunk_masks(
    chunk: Sequence[Piece], slices: SliceSet, g: Mapping[str, Tensor], noise: Noise | None = None
) -> dict[str, MaskedRows]:
    """The masks of a chunk of a plan: for each matrix that one of its variants replaces, on which rows and by what.

    `g[m]` `[B, T, C]` are the importances that masks start from; variants with fixed masks need neither them nor
    `noise`, and a chunk has fixed masks in all its variants or in none. Numbers that variants bring get gradients,
    and are not spread out over the rows that share them, where all the chunk's variants bring some.
    """
    masks = {}
    for name in slices.names:
        pieces = [(first, piece) for first, piece in _numbered(chunk) if name in piece.variant.matrices]
        if not pieces:
            continue
        if pieces[0][1].variant.fixed is not None:
            masks[name] = _fixed_rows(pieces, name)
        elif all(piece.variant.numbers is not None for _, piece in pieces):
            masks[name] = _brought_rows(pieces, name, g[name], slices.delta)
        else:
            masks[name] = _drawn_rows(pieces, name, g[name], slices.delta, noise)
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
        left_alone = _left_alone(piece, name, g.device)
        if left_alone is not None and own_numbers is not None and own_deltas is not None:
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
    if piece.variant.delta is not None:
        deltas.fill_(piece.variant.delta)
    elif delta and source.code:  # else they are 0 already
        fill(deltas, piece, name, "delta", noise)


def _left_alone(piece: Piece, name: str, device: torch.device) -> Tensor | None:
    """Where the piece's variant leaves matrix `name` to the target, `[n, T, 1]` bool; None is nowhere."""
    routed = piece.variant.routed
    return None if routed is None else ~sent(routed[name][piece.start : piece.stop, :, None], device)


def _brought_rows(pieces: Sequence[tuple[int, Piece]], name: str, g: Tensor, delta: bool) -> MaskedRows:
    """As `_drawn_rows`, of variants that all bring their numbers: a row's are shared as the variant shares them."""
    rows = _ranges([(first, first + len(piece)) for first, piece in pieces], g)
    origin = _ranges([(piece.start, piece.stop) for _, piece in pieces], g)
    routed = any(piece.variant.routed is not None for _, piece in pieces)
    moves, offs, draws, count = [], [], [], 0
    for _, piece in pieces:
        own, off = _brought(piece, name)
        if piece.variant.delta is not None or not delta:
            off = own.new_full((1, 1, 1), piece.variant.delta or 0.0)
        left_alone = _left_alone(piece, name, g.device)
        if left_alone is not None:
            own, off = (torch.where(left_alone, 1.0, tensor) for tensor in (own, off))
        size = max(len(own), len(off))
        moves.append(own.expand(size, -1, -1))
        offs.append(off.expand(size, -1, -1))
        draws.append(torch.arange(count, count + size, device=g.device).expand(len(piece) if size == 1 else size))
        count += size
    return MaskedRows(rows, g, _joined(offs) if delta or routed else None, origin, _joined(moves), torch.cat(draws))


def _joined(numbers: Sequence[Tensor]) -> Tensor:
    """Numbers `[n, t, ...]` of several variants, one after the other; t is the most that one of them has."""
    length = max(tensor.shape[1] for tensor in numbers)
    return torch.cat([tensor.expand(-1, length, -1) for tensor in numbers])


def _fixed_rows(pieces: Sequence[tuple[int, Piece]], name: str) -> MaskedRows:
    """The masks of matrix `name` in variants that have fixed ones: one mask a variant."""
    masks, deltas = [], []
    for _, piece in pieces:
        assert piece.variant.fixed is not None
        masks.append(piece.variant.fixed[name])
        deltas += [piece.variant.delta or 0.0] * len(piece)
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


def held_masks(g: Mapping[str, Tensor], delta: float) -> dict[str, MaskedRows]:
    """`g[m]` `[B, T, C]` in every row, and the delta's mask `delta` at every position of every matrix at once.

    The delta is W - U V whether or not the decomposition counts it as a component.
    """
    whole = {name: torch.arange(len(mask), device=mask.device) for name, mask in g.items()}
    held = {name: mask.new_full((*mask.shape[:-1], 1), delta) for name, mask in g.items()}
    return {name: MaskedRows(whole[name], mask, held[name]) for name, mask in g.items()}
