"""Runs a target once and listens in; then pushes a plan's rows through its blocks, once.

    clean pass   the target on B sequences, no gradient: every block's entry, every matrix's input, log p
    plan pass    rows of many variants together. Each enters at its first changed block as a copy of the clean
                 hidden state there; in a block, a decomposed matrix replaces its output on the rows that ask

Blocks are replayed as they were called: tensors with the sequences as first dimension are gathered by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spdcli.engine.losses import unembed_kl
from spdcli.engine.plan import Piece, Variant
from spdcli.engine.subcomponents import SliceSet, masked_product
from spdcli.engine.target import Batch, Matrix, Target


@dataclass(eq=False)
class Clean:
    """What the target does on a batch of B sequences of T positions.

    `entries[b]` `[B, T, D]` is the hidden state that enters block b, `calls[b]` the other arguments it got,
    `inputs[m]` `[B, T, I]` what matrix m reads, `log_probs` `[n, N]` the target's predictions at the n positions
    looked at, in the order of `batch.looked`; `place` `[B, T]` numbers them, `spots` `[n]` are their places in the
    flat `[B * T]`, and those of sequence i start at `firsts[i]`. `patterns[b]` `[B, H, T, T]` are block b's attention
    log-probabilities, when they were asked for.
    """

    batch: Batch
    entries: list[Tensor]
    calls: list[tuple[tuple, dict]]
    inputs: dict[str, Tensor]
    log_probs: Tensor
    place: Tensor
    spots: Tensor
    firsts: list[int]
    patterns: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def clean_pass(target: Target, batch: Batch, names: Iterable[str], patterns: bool = False) -> Clean:
    """Run the target on `batch` and keep what a step needs.

    `names` are the matrices whose inputs are wanted; with `patterns` the attention of every block is kept too.
    """
    entries: list[Tensor] = []
    calls: list[tuple[tuple, dict]] = []
    inputs: dict[str, Tensor] = {}
    last: list[Tensor] = []

    def keep_call(module: nn.Module, args: tuple, kwargs: dict) -> None:
        entries.append(args[0])
        calls.append((args[1:], kwargs))

    handles = [block.register_forward_pre_hook(keep_call, with_kwargs=True) for block in target.blocks]
    handles.append(target.blocks[-1].register_forward_hook(lambda module, args, output: last.append(hidden_of(output))))
    for name in names:
        keep_input = lambda module, args, name=name: inputs.__setitem__(name, args[0])  # noqa: E731
        handles.append(target.matrices[name].module.register_forward_pre_hook(keep_input))
    try:
        with recording(target, patterns) as recorded:
            target.run(batch.tokens, batch.valid)
    finally:
        for handle in handles:
            handle.remove()
    logits = F.linear(target.finish(last[0][batch.looked]), target.unembedding, target.unembedding_bias)
    place = batch.looked.flatten().cumsum(0).sub(1).view_as(batch.looked)
    spots = batch.looked.flatten().nonzero()[:, 0]
    firsts = [0, *batch.looked.sum(1).cumsum(0).tolist()]
    return Clean(batch, entries, calls, inputs, logits.log_softmax(-1), place, spots, firsts, recorded)


def recording(target: Target, wanted: bool) -> AbstractContextManager[list[Tensor]]:
    """The target's attention patterns while open, or an empty list when they are not wanted."""
    if not wanted:
        return nullcontext([])
    assert target.record_patterns is not None, "this target does not tell its attention patterns"
    return target.record_patterns()


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block, or a part of one, returns."""
    return output[0] if isinstance(output, tuple) else output


@dataclass(eq=False)
class Asked:
    """Rows that want a matrix replaced: their numbers `[r]`, masks `[r, T, C]`, delta masks `[r, T, 1]` or None."""

    rows: Tensor
    mask: Tensor
    delta: Tensor | None


class Noise:
    """Uniform numbers for stochastic masks, from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, piece: Piece, name: str, kind: str, shape: Sequence[int]) -> Tensor:
        """`shape` uniform numbers for matrix `name` of `piece`; `kind` is mask or delta."""
        return torch.rand(shape, generator=self.generator, device=self.generator.device)


def piece_mask(piece: Piece, name: str, g: Tensor | None, delta: bool, noise: Noise) -> tuple[Tensor, Tensor | None]:
    """Mask `[r, T, C]` and delta mask `[r, T, 1]` of matrix `name` for the rows of one piece.

    Importance masks are g with the delta off; stochastic ones U(g, 1) with the delta's from U(0, 1). Where the
    variant leaves the target alone both are 1, which is the target's own matrix. Fixed masks are the same at every
    position, so that T is 1; they need no g.
    """
    variant = piece.variant
    if variant.fixed is not None:
        fixed = variant.fixed[name].expand(len(piece), 1, -1)
        return fixed, fixed.new_full((len(piece), 1, 1), variant.delta) if variant.delta else None
    assert g is not None
    mask, keep = g[piece.start : piece.stop], None
    if piece.variant.source == "stochastic":
        mask = mask + (1 - mask) * noise(piece, name, "mask", mask.shape).to(mask.dtype)
        if delta:
            keep = noise(piece, name, "delta", (*mask.shape[:-1], 1)).to(mask.dtype)
    if delta and keep is None:
        keep = mask.new_zeros(*mask.shape[:-1], 1)
    if piece.variant.routed is not None:
        routed = piece.variant.routed[name][piece.start : piece.stop, :, None].to(mask.device)
        mask = torch.where(routed, mask, 1.0)
        keep = torch.where(routed, 0.0 if keep is None else keep, 1.0).to(mask.dtype)
    return mask, keep


def ask(chunk: Sequence[Piece], name: str, g: Tensor | None, delta: bool, noise: Noise) -> Asked | None:
    """What a chunk asks of matrix `name`, or None when no variant in it replaces that matrix."""
    rows, masks, deltas = [], [], []
    first = 0
    for piece in chunk:
        if name in piece.variant.matrices:
            mask, keep = piece_mask(piece, name, g, delta, noise)
            rows.append(torch.arange(first, first + len(piece), device=mask.device))
            masks.append(mask)
            deltas.append(keep)
        first += len(piece)
    if not rows:
        return None
    whole = None
    if any(keep is not None for keep in deltas):
        whole = torch.cat(
            [m.new_zeros(*m.shape[:-1], 1) if d is None else d for m, d in zip(masks, deltas, strict=True)]
        )
    return Asked(torch.cat(rows), torch.cat(masks), whole)


def replaced_output(x: Tensor, matrix: Matrix, U: Tensor, V: Tensor, asked: Asked) -> Tensor:
    """The matrix's output `[R, T, O]` on all rows: masked slices on the rows asked for, the target's on the rest."""
    count = x.shape[0]
    if len(asked.rows) == count:
        out = masked_product(x, matrix.weight, U, V, asked.mask, asked.delta)
    else:
        plain = torch.ones(count, dtype=torch.bool, device=x.device).index_fill(0, asked.rows, False).nonzero()[:, 0]
        masked = masked_product(x.index_select(0, asked.rows), matrix.weight, U, V, asked.mask, asked.delta)
        rest = x.index_select(0, plain) @ matrix.weight
        back = torch.cat([asked.rows, plain]).argsort()
        out = torch.cat([masked, rest]).index_select(0, back)
    return out if matrix.bias is None else out + matrix.bias


@contextmanager
def replaced(target: Target, slices: SliceSet, asked: Mapping[str, Asked]) -> Iterator[None]:
    """While open, the modules of the matrices in `asked` answer with masked slices on the rows that ask."""
    parts: dict[nn.Module, list[Matrix]] = {}
    for matrix in target.matrices.values():
        parts.setdefault(matrix.module, []).append(matrix)
    touched = [module for module, matrices in parts.items() if any(m.name in asked for m in matrices)]

    def forward_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            outputs = [_part_output(x, matrix, slices, asked) for matrix in parts[module]]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

        return forward

    try:
        for module in touched:
            module.forward = forward_of(module)
        yield
    finally:
        for module in touched:
            module.__dict__.pop("forward", None)


def _part_output(x: Tensor, matrix: Matrix, slices: SliceSet, asked: Mapping[str, Asked]) -> Tensor:
    if matrix.name in asked:
        own = slices.of(matrix.name)
        return replaced_output(x, matrix, own.U, own.V, asked[matrix.name])
    out = x @ matrix.weight
    return out if matrix.bias is None else out + matrix.bias


def rows_of(value: Any, sequences: int, index: Tensor) -> Any:
    """A block's recorded argument for other rows: tensors with the sequences first are gathered, the rest passes.

    What all sequences share must have one dimension, or a first dimension of 1: `[T, D]` would be taken for B = T.
    """
    if isinstance(value, Tensor):
        return value.index_select(0, index) if value.dim() >= 2 and value.shape[0] == sequences else value
    if isinstance(value, (tuple, list)):
        return type(value)(rows_of(item, sequences, index) for item in value)
    if isinstance(value, dict):
        return {key: rows_of(item, sequences, index) for key, item in value.items()}
    return value


def plan_pass(
    target: Target, slices: SliceSet, clean: Clean, chunk: Sequence[Piece], asked: Mapping[str, Asked]
) -> Tensor:
    """Hidden states after the last block, `[R, T, D]`, of all rows of a chunk, in the order of its pieces."""
    device = clean.place.device
    sequences = len(clean.place)
    rows = [torch.arange(piece.start, piece.stop, device=device) for piece in chunk]
    index = torch.cat(rows)
    alive = 0
    hidden = clean.entries[0][:0]
    with replaced(target, slices, asked):
        for number in range(chunk[0].variant.entry, len(target.blocks)):
            entering = sum(len(piece) for piece in chunk if piece.variant.entry == number)
            if entering:
                fresh = clean.entries[number].index_select(0, index[alive : alive + entering])
                hidden = torch.cat([hidden, fresh])
                alive += entering
            args, kwargs = rows_of(clean.calls[number], sequences, index[:alive])
            hidden = hidden_of(target.blocks[number](hidden, *args, **kwargs))
    return hidden


def row_divergences(
    target: Target, clean: Clean, chunk: Sequence[Piece], hidden: Tensor, reverse: bool
) -> list[Tensor]:
    """KL at every looked-at position of every piece, in nats: a `[k]` tensor a piece, sequences in order."""
    positions = hidden.shape[1]
    spots, index, first = [], [], 0
    for piece in chunk:
        known = slice(clean.firsts[piece.start], clean.firsts[piece.stop])
        spots.append(clean.spots[known] + (first - piece.start) * positions)
        index.append(torch.arange(known.start, known.stop, device=hidden.device))
        first += len(piece)
    finished = target.finish(hidden.flatten(0, 1).index_select(0, torch.cat(spots)))
    divergence = unembed_kl(
        finished, target.unembedding, target.unembedding_bias, clean.log_probs, torch.cat(index), reverse
    )
    return list(divergence.split([len(part) for part in index]))


@torch.no_grad()
def masked_logits(target: Target, slices: SliceSet, clean: Clean, masks: Mapping[str, Asked]) -> Tensor:
    """Logits `[n, N]` at the looked-at positions of the target with the matrices in `masks` replaced.

    Every `Asked` covers all B sequences of the batch.
    """
    entry = min((target.matrices[name].block for name in masks), default=len(target.blocks) - 1)
    whole = Piece(Variant("", "importance", frozenset(masks), entry, 1.0), 0, len(clean.place))
    hidden = plan_pass(target, slices, clean, [whole], masks)
    return F.linear(target.finish(hidden[clean.batch.looked]), target.unembedding, target.unembedding_bias)


def importance_masks(g: Mapping[str, Tensor], delta: bool) -> dict[str, Asked]:
    """The masks of the model made of active slices alone: `g[m]` `[B, T, C]` in every row, the delta off."""
    whole = {name: torch.arange(len(mask), device=mask.device) for name, mask in g.items()}
    off = {name: mask.new_zeros(*mask.shape[:-1], 1) if delta else None for name, mask in g.items()}
    return {name: Asked(whole[name], mask, off[name]) for name, mask in g.items()}
