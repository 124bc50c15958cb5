"""How far hidden activations of variants are from the target's: what a plan pass compares on its way (hidden losses).

At every place of a variant, a site (a row of `loss_choices.HIDDEN_SITES`) and a position,

    error = ‖a' - a‖² / ‖r‖²,

where a is the target's activation on the same sequence, a' the variant's and r what sets the scale:

    matrix   a is what a replaced matrix gives, x W + bias, at the positions where it is replaced, and r is a
    block    a is the hidden state after a block that holds a replaced matrix, at every real position, and r is what the
             target has written since the variant left it: a less the hidden state at the variant's entry

so that every place counts alike, however long its activation. Where the target writes nothing, as at most positions of
a matrix whose slices are needed at a few, any error is then without bound: with the scale "sequence" ‖r‖² is instead
its mean over the sequence's positions at that site. A variant's error is the mean over its places. Nothing after the
last such block is needed for it, nor is the unembedding: `last_block` says where a pass may stop.
R rows of a chunk, B sequences, T positions, D width of the residual stream, O d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from spdcli.engine.loss_choices import HIDDEN_SCALES, HIDDEN_SITES
from spdcli.engine.target import Matrix, Target, at_least_float32, sent
from spdcli.engine.variants import Piece, Variant


def last_block(target: Target, variant: Variant) -> int:
    """The number of the last block that the losses of `variant` look at: the last one of all, or where hidden
    activations are all that is compared, the last that holds one of its matrices."""
    if variant.compares_outputs:
        return len(target.blocks) - 1
    return max(target.matrices[name].block for name in variant.matrices)


class HiddenWatch:
    """Listens to a plan pass over the pieces of one chunk, and adds up the errors of those with a hidden loss.

    `inputs[m]` `[B, T, I]` and `states[b]` `[B, T, D]`, the hidden state that enters block b, or leaves the last one,
    are those of the clean pass; `valid` `[B, T]` is False at padding. `whole` is that of the whole batch, where these
    are a part of its sequences. `scale` is a key of HIDDEN_SCALES.
    """

    def __init__(
        self,
        target: Target,
        inputs: dict[str, Tensor],
        states: Sequence[Tensor],
        valid: Tensor,
        chunk: Sequence[Piece],
        whole: Tensor | None = None,
        scale: str = "position",
    ) -> None:
        self.target, self.inputs, self.states, self.valid = target, inputs, states, valid
        self.scale: Callable[[Tensor, Tensor], Tensor] = HIDDEN_SCALES[scale].load()
        self.whole = valid if whole is None else whole
        firsts = accumulate((len(piece) for piece in chunk), initial=0)
        self.pieces = [(first, piece) for first, piece in zip(firsts, chunk, strict=False) if piece.variant.hidden]
        self.sums: dict[Piece, Tensor | float] = {piece: 0.0 for _, piece in self.pieces}

    def matrix(self, matrix: Matrix, out: Tensor) -> None:
        """Told what a matrix gives, `out` `[R, T, O]`."""

    def block(self, number: int, hidden: Tensor) -> None:
        """Told what leaves a block, `hidden` `[R, T, D]`; R are the rows that are in the pass by then."""

    def places(self, variant: Variant) -> Tensor:
        """How many places a variant of the whole batch has in all its sequences, one number."""
        raise NotImplementedError

    def errors(self) -> Iterator[tuple[Variant, slice, Tensor]]:
        """For each piece with a hidden loss its variant, its sequences and their errors `[n]`, scaled so that the mean
        over the batch's sequences is the variant's error: the mean over its places."""
        for _, piece in self.pieces:
            total = self.sums[piece]
            assert isinstance(total, Tensor)
            share = len(self.whole) / self.places(piece.variant.whole or piece.variant).to(total.dtype)
            yield piece.variant, slice(piece.start, piece.stop), total * share

    def _add(self, piece: Piece, actual: Tensor, clean: Tensor, scale: Tensor, counted: Tensor) -> None:
        """Add ‖actual - clean‖² / ‖scale‖² `[n, T]`, where `counted` is True, to the piece's sums over positions."""
        size = self.scale(at_least_float32(scale).square().sum(-1), counted)
        error = (actual.to(size.dtype) - clean).square().sum(-1) / size.clamp(min=torch.finfo(size.dtype).tiny)
        self.sums[piece] = self.sums[piece] + torch.where(counted, error, 0.0).sum(1)


class MatrixWatch(HiddenWatch):
    """The site "matrix"."""

    def matrix(self, matrix: Matrix, out: Tensor) -> None:
        pieces = [(first, piece) for first, piece in self.pieces if matrix.name in piece.variant.matrices]
        if not pieces:
            return
        with torch.no_grad():
            x = self.inputs[matrix.name]
            clean = x @ matrix.weight
            clean = (clean if matrix.bias is None else clean + matrix.bias).to(x.dtype)
        for first, piece in pieces:
            own = clean[piece.start : piece.stop]
            counted = _replaced(self.valid, piece.variant, matrix.name)[piece.start : piece.stop]
            self._add(piece, out[first : first + len(piece)], own, own, counted)

    def places(self, variant: Variant) -> Tensor:
        return torch.stack([_replaced(self.whole, variant, name).sum() for name in sorted(variant.matrices)]).sum()


class BlockWatch(HiddenWatch):
    """The site "block"."""

    def block(self, number: int, hidden: Tensor) -> None:
        for first, piece in self.pieces:
            if number in self._blocks(piece.variant):
                rows = slice(piece.start, piece.stop)
                clean, entry = self.states[number + 1][rows], self.states[piece.variant.entry][rows]
                self._add(piece, hidden[first : first + len(piece)], clean, clean - entry, self.valid[rows])

    def places(self, variant: Variant) -> Tensor:
        return self.whole.sum() * len(self._blocks(variant))

    def _blocks(self, variant: Variant) -> set[int]:
        return {self.target.matrices[name].block for name in variant.matrices}


def by_position(size: Tensor, counted: Tensor) -> Tensor:
    """The squared lengths `size` `[n, T]`, each the scale of its own position."""
    return size


def by_sequence(size: Tensor, counted: Tensor) -> Tensor:
    """The mean `[n, 1]` of the squared lengths `size` `[n, T]` over a sequence's `counted` positions."""
    return torch.where(counted, size, 0.0).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)


def _replaced(valid: Tensor, variant: Variant, name: str) -> Tensor:
    """Of the `valid` positions `[B, T]` those at which the variant replaces matrix `name`."""
    return valid if variant.routed is None else valid & sent(variant.routed[name], valid.device)


def hidden_watch(
    site: str,
    target: Target,
    inputs: dict[str, Tensor],
    states: Sequence[Tensor],
    valid: Tensor,
    chunk: Sequence[Piece],
    whole: Tensor | None = None,
    scale: str = "position",
) -> HiddenWatch:
    """What listens to a chunk at `site`, a key of HIDDEN_SITES; the other arguments as in `HiddenWatch`."""
    return HIDDEN_SITES[site].load()(target, inputs, states, valid, chunk, whole, scale)
