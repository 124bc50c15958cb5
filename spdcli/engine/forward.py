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
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spdcli.engine.losses import unembed_kl
from spdcli.engine.product import Asked, replaced_product
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.target import Batch, LookedAt, Matrix, Target, sent
from spdcli.engine.variants import Piece, Variant


@dataclass(eq=False)
class Clean:
    """What the target does on a batch of B sequences of T positions.

    `entries[b]` `[B, T, D]` is the hidden state that enters block b, `calls[b]` the other arguments it got,
    `inputs[m]` `[B, T, I]` what matrix m reads, `log_probs` `[n, N]` the target's predictions at the n positions
    looked at, which `at` knows. `patterns[b]` `[B, H, T, T]` are block b's attention log-probabilities, when they were
    asked for.
    """

    batch: Batch
    entries: list[Tensor]
    calls: list[tuple[tuple, dict]]
    inputs: dict[str, Tensor]
    log_probs: Tensor
    patterns: list[Tensor] = field(default_factory=list)

    @property
    def at(self) -> LookedAt:
        return self.batch.looked_at

    @property
    def padding(self) -> Tensor | None:
        """`batch.valid` where some of it is False, else None."""
        return self.batch.valid if self.at.padded else None


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
            target.run(batch.tokens)
    finally:
        for handle in handles:
            handle.remove()
    log_probs = _logits_at(target, last[0], batch.looked_at.spots).log_softmax(-1)
    return Clean(batch, entries, calls, inputs, log_probs, recorded)


def _logits_at(target: Target, hidden: Tensor, spots: Tensor) -> Tensor:
    """Logits `[n, N]` at `spots` of the last block's output `[B, T, D]`."""
    finished = target.finish(hidden.flatten(0, 1).index_select(0, spots))
    return F.linear(finished, target.unembedding, target.unembedding_bias)


def recording(target: Target, wanted: bool) -> AbstractContextManager[list[Tensor]]:
    """The target's attention patterns while open, or an empty list when they are not wanted."""
    if not wanted:
        return nullcontext([])
    assert target.record_patterns is not None, "this target does not tell its attention patterns"
    return target.record_patterns()


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block, or a part of one, returns."""
    return output[0] if isinstance(output, tuple) else output


class Noise:
    """Uniform numbers for stochastic masks, from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, out: Tensor, piece: Piece, name: str, kind: str) -> None:
        """Fill `out` with uniform numbers for matrix `name` of `piece`; `kind` is mask or delta."""
        out.uniform_(generator=self.generator)


def ask(chunk: Sequence[Piece], name: str, g: Tensor | None, delta: bool, noise: Noise) -> Asked | None:
    """What a chunk asks of matrix `name`, or None when no variant in it replaces that matrix.

    Importance masks are g `[B, T, C]` with the delta off; stochastic ones U(g, 1) with the delta's from U(0, 1); a
    variant's own delta mask, where it has one, stands instead. Where
    a variant leaves the target alone both are 1, which is the target's own matrix. Fixed masks need no g, and a chunk
    has them in all its variants or in none.
    """
    starts = [0, *accumulate(len(piece) for piece in chunk)]
    wanted = [(first, piece) for first, piece in zip(starts, chunk, strict=False) if name in piece.variant.matrices]
    if not wanted:
        return None
    if g is None:
        return _ask_fixed(wanted, name)
    rows = _ranges([(first, first + len(piece)) for first, piece in wanted], g)
    origin = _ranges([(piece.start, piece.stop) for _, piece in wanted], g)
    pieces = [piece for _, piece in wanted]
    routed = any(piece.variant.routed is not None for piece in pieces)
    stochastic = any(piece.variant.source == "stochastic" for piece in pieces)
    drawn = g.new_empty(len(rows), *g.shape[1:]) if stochastic or routed else None
    keep = g.new_zeros(len(rows), g.shape[1], 1) if delta or routed else None
    done = 0
    for piece in pieces:
        part, done = slice(done, done + len(piece)), done + len(piece)
        if drawn is not None:
            if piece.variant.source == "stochastic":
                noise(drawn[part], piece, name, "mask")
            else:
                drawn[part] = 0.0
        if keep is not None and piece.variant.delta:
            keep[part] = piece.variant.delta
        elif keep is not None and delta and piece.variant.source == "stochastic":
            noise(keep[part], piece, name, "delta")
        if piece.variant.routed is not None and drawn is not None and keep is not None:
            left_alone = ~sent(piece.variant.routed[name][piece.start : piece.stop, :, None], g.device)
            drawn[part].masked_fill_(left_alone, 1.0)  # noise 1 is a mask of 1
            keep[part].masked_fill_(left_alone, 1.0)
    return Asked(rows, g, keep, origin, drawn)


def _ask_fixed(wanted: Sequence[tuple[int, Piece]], name: str) -> Asked:
    """What fixed variants ask of matrix `name`: one mask a variant."""
    masks, deltas = [], []
    for _, piece in wanted:
        assert piece.variant.fixed is not None
        masks.append(piece.variant.fixed[name])
        deltas += [piece.variant.delta] * len(piece)
    mask = torch.stack(masks)[:, None]
    numbers = torch.arange(len(masks), device=mask.device)
    counts = torch.tensor([len(piece) for _, piece in wanted], device=mask.device)
    rows = _ranges([(first, first + len(piece)) for first, piece in wanted], mask)
    delta = mask.new_tensor(deltas)[:, None, None] if any(deltas) else None
    return Asked(rows, mask, delta, numbers.repeat_interleave(counts, output_size=len(rows)))


def _ranges(bounds: Iterable[tuple[int, int]], like: Tensor) -> Tensor:
    """The numbers of several ranges in a row, on the device of `like`."""
    return torch.cat([torch.arange(start, stop, device=like.device) for start, stop in bounds])


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
        return replaced_product(x, matrix.weight, matrix.bias, own.U, own.V, asked[matrix.name])
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
    target: Target,
    slices: SliceSet,
    clean: Clean,
    chunk: Sequence[Piece],
    asked: Mapping[str, Asked],
    ends: bool = False,
) -> Tensor:
    """Hidden states after the last block, `[R, T, D]`, of all rows of a chunk, in the order of its pieces.

    With `ends`, and a target that can, those at the last position alone, `[R, 1, D]`.
    """
    device = clean.batch.tokens.device
    sequences = len(clean.batch.tokens)
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
            block: Callable[..., Any] = target.blocks[number]
            if ends and target.last_block is not None and number == len(target.blocks) - 1:
                block = target.last_block
            hidden = hidden_of(block(hidden, *args, **kwargs))
    return hidden


def row_divergences(
    target: Target, clean: Clean, chunk: Sequence[Piece], hidden: Tensor, reverse: bool
) -> list[Tensor]:
    """KL at every looked-at position of every piece, in nats: a `[k]` tensor a piece, sequences in order.

    `hidden` `[R, T, D]`, or `[R, 1, D]` at the last position, is what `plan_pass` gives.
    """
    at, positions, length = clean.at, hidden.shape[1], clean.batch.tokens.shape[1]
    looked = at.spots - (length - positions) * (at.spots // length + 1)  # places in the flat [B * positions]
    spots, index, first = [], [], 0
    for piece in chunk:
        known = slice(at.firsts[piece.start], at.firsts[piece.stop])
        spots.append(looked[known] + (first - piece.start) * positions)
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
    whole = Piece(Variant("", "importance", frozenset(masks), entry, 1.0), 0, len(clean.batch.tokens))
    hidden = plan_pass(target, slices, clean, [whole], masks)
    return _logits_at(target, hidden, clean.at.spots)


def importance_masks(g: Mapping[str, Tensor], delta: bool) -> dict[str, Asked]:
    """The masks of the model made of active slices alone: `g[m]` `[B, T, C]` in every row, the delta off."""
    whole = {name: torch.arange(len(mask), device=mask.device) for name, mask in g.items()}
    off = {name: mask.new_zeros(*mask.shape[:-1], 1) if delta else None for name, mask in g.items()}
    return {name: Asked(whole[name], mask, off[name]) for name, mask in g.items()}
