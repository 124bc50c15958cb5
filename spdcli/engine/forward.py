"""Runs a target once and listens in; then pushes a plan's rows through its blocks, once (Algorithm 3, lines 2 and 5).

    clean pass   the target on B sequences, no gradient: every block's entry, every matrix's input, its outputs
    plan pass    rows of many variants together. Each enters at its first changed block as a copy of the clean
                 hidden state there; in a block, a decomposed matrix's output is replaced on the rows that have masks

Blocks are replayed as they were called: tensors with the sequences as first dimension are gathered by row.
Letters: B sequences, T positions, R rows of a chunk, D width of the residual stream, I d_in, O d_out, C slices,
N vocabulary, n positions that losses look at, H attention heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spdcli.engine.hidden import HiddenWatch, last_block
from spdcli.engine.loss_choices import OUTPUT_LOSSES
from spdcli.engine.product import MaskedRows
from spdcli.engine.replacement import replaced
from spdcli.engine.rows import by_sequence, hidden_of, rows_of
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.target import Batch, LookedAt, Target, at_least_float32, log_probabilities
from spdcli.engine.variants import Piece, Variant


@dataclass(eq=False)
class Clean:
    """What the target does on a batch of B sequences of T positions.

    `entries[b]` `[B, T, D]` is the hidden state that enters block b, `calls[b]` the other arguments it got, `exit` `[B,
    T, D]` leaves the last one that was run, `inputs[m]` `[B, T, I]` is what matrix m reads, `outputs` `[n, N]` what the
    target says at the n positions looked at, which `at` has: log-probabilities of the next token, or vectors
    (`Target.output_loss`). `patterns[b]` `[B, H, T, T]` are block b's attention log-probabilities; the list is empty
    unless `clean_pass` was told to keep them.
    """

    batch: Batch
    entries: list[Tensor]
    calls: list[tuple[tuple, dict]]
    inputs: dict[str, Tensor]
    outputs: Tensor
    exit: Tensor
    patterns: list[Tensor] = field(default_factory=list)

    @property
    def log_probs(self) -> Tensor:
        """`outputs` of a target that predicts tokens."""
        return self.outputs

    @property
    def at(self) -> LookedAt:
        """Where the n positions that losses look at are."""
        return self.batch.looked_at

    @property
    def padding(self) -> Tensor | None:
        """`batch.valid` `[B, T]` where some of it is False, else None."""
        return self.batch.valid if self.at.padded else None


@torch.no_grad()
def clean_pass(
    target: Target, batch: Batch, names: Iterable[str], patterns: bool = False, outputs: bool = True
) -> Clean:
    """Run the target on `batch` (tokens `[B, T]`) and keep what a step needs: see `Clean`.

    The inputs `[B, T, I]` of the matrices `names` are kept; with `patterns` the attention of every block too. Without
    `outputs` neither the blocks after the last of these matrices nor the unembedding are run: `exit` is what leaves the
    last block that was, and there are no outputs.
    """
    names = list(names)
    entries: list[Tensor] = []
    calls: list[tuple[tuple, dict]] = []
    inputs: dict[str, Tensor] = {}
    last: list[Tensor] = []

    after = len(target.blocks) if outputs else 1 + max(target.matrices[name].block for name in names)

    def keep_call(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if len(entries) == after:
            last.append(args[0])
            raise _Enough
        entries.append(args[0])
        calls.append((args[1:], kwargs))

    handles = [block.register_forward_pre_hook(keep_call, with_kwargs=True) for block in target.blocks]
    handles.append(target.blocks[-1].register_forward_hook(lambda module, args, output: last.append(hidden_of(output))))
    for name in names:
        keep_input = lambda module, args, name=name: inputs.__setitem__(name, args[0])  # noqa: E731
        handles.append(target.matrices[name].module.register_forward_pre_hook(keep_input))
    try:
        with recording(target, patterns) as recorded, suppress(_Enough):
            target.run(batch.tokens)
    finally:
        for handle in handles:
            handle.remove()
    inputs = {name: at_least_float32(by_sequence(x, last[0])) for name, x in inputs.items()}
    if not outputs:
        return Clean(batch, entries, calls, inputs, last[0].new_zeros(0, len(target.unembedding)), last[0], recorded)
    said = outputs_after(target, last[0], batch.looked_at.spots)
    if OUTPUT_LOSSES[target.output_loss].distributions:
        said = log_probabilities(said)
    return Clean(batch, entries, calls, inputs, said, last[0], recorded)


class _Enough(Exception):
    """Ends a pass of the target early: all that it is run for has been seen."""


def outputs_after(target: Target, hidden: Tensor, spots: Tensor) -> Tensor:
    """Logits, or output vectors, `[n, N]` at `spots` of the last block's output `[B, T, D]`."""
    return target.outputs(hidden.flatten(0, 1).index_select(0, spots))


def recording(target: Target, patterns: bool) -> AbstractContextManager[list[Tensor]]:
    """A list that gets the attention log-probabilities `[R, H, T, T]` of every block that runs while it is open; one
    that stays empty without `patterns`."""
    if not patterns:
        return nullcontext([])
    assert target.record_patterns is not None, "this target does not tell its attention patterns"
    return target.record_patterns()


def plan_pass(
    target: Target,
    slices: SliceSet,
    clean: Clean,
    chunk: Sequence[Piece],
    masks: Mapping[str, MaskedRows],
    ends: bool = False,
    watch: HiddenWatch | None = None,
) -> Tensor:
    """Hidden states after the last block, `[R, T, D]`, of all rows of a chunk, in the order of its pieces.

    `masks[m]` are the masks of matrix m, which `masks.chunk_masks` makes. With `ends`, and a target that can, the
    answer is that of the last position alone, `[R, 1, D]`. `watch` is told what replaced matrices and blocks give; a
    chunk without a loss of outputs goes no further than its hidden losses look, and that is what is given.
    """
    last = max(last_block(target, piece.variant) for piece in chunk)
    device = clean.batch.tokens.device
    sequences = len(clean.batch.tokens)
    rows = [torch.arange(piece.start, piece.stop, device=device) for piece in chunk]
    index = torch.cat(rows)
    alive = 0
    hidden = clean.entries[0][:0]
    with replaced(target, slices, masks, watch):
        for number in range(chunk[0].variant.entry, last + 1):
            entering = sum(len(piece) for piece in chunk if piece.variant.entry == number)
            if entering:
                fresh = clean.entries[number].index_select(0, index[alive : alive + entering])
                hidden = torch.cat([hidden, fresh])
                alive += entering
            args, kwargs = rows_of(clean.calls[number], sequences, index[:alive], target.by_head)
            block: Callable[..., Any] = target.blocks[number]
            if ends and target.last_block is not None and number == len(target.blocks) - 1:
                block = target.last_block
            hidden = hidden_of(block(hidden, *args, **kwargs))
            if watch is not None:
                watch.block(number, hidden)
    return hidden


def row_divergences(
    target: Target, clean: Clean, chunk: Sequence[Piece], hidden: Tensor, reverse: bool
) -> list[Tensor]:
    """How far every looked-at position is from the target: a tensor a piece, `[k]` for its k positions in order.

    `hidden` `[R, T, D]`, or `[R, 1, D]` at the last position, is what `plan_pass` gives. It is the target's own
    `output_loss`: KL(target ‖ variant) in nats, with `reverse` KL(variant ‖ target), or a squared error.
    """
    at, positions, length = clean.at, hidden.shape[1], clean.batch.valid.shape[1]
    looked = at.spots - (length - positions) * (at.spots // length + 1)  # places in the flat [B * positions]
    spots, index, first = [], [], 0
    for piece in chunk:
        part = slice(at.firsts[piece.start], at.firsts[piece.stop])
        spots.append(looked[part] + (first - piece.start) * positions)
        index.append(torch.arange(part.start, part.stop, device=hidden.device))
        first += len(piece)
    finished = target.finish(hidden.flatten(0, 1).index_select(0, torch.cat(spots)))
    distance = OUTPUT_LOSSES[target.output_loss].load()
    divergence = distance(
        finished,
        target.unembedding,
        target.unembedding_bias,
        clean.outputs,
        torch.cat(index),
        reverse,
        target.logit_map,
    )
    return list(divergence.split([len(numbers) for numbers in index]))


@torch.no_grad()
def masked_logits(target: Target, slices: SliceSet, clean: Clean, masks: Mapping[str, MaskedRows]) -> Tensor:
    """Logits `[n, N]`, at the looked-at positions, of the target with the matrices in `masks` replaced.

    Each of `masks` covers all B sequences of the batch, as those of `masks.importance_masks` do.
    """
    entry = min((target.matrices[name].block for name in masks), default=len(target.blocks) - 1)
    whole = Piece(Variant("", "importance", frozenset(masks), entry, 1.0), 0, len(clean.batch.tokens))
    hidden = plan_pass(target, slices, clean, [whole], masks)
    return outputs_after(target, hidden, clean.at.spots)
