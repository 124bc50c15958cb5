"""Variants of a target run over a plan, in chunks, and how far each is from the target: outputs, attention, hidden.

`reconstruction` is the whole of it. B sequences, T positions, R rows of a chunk, C slices, H attention heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, plan_pass, recording, row_divergences
from spdcli.engine.hidden import hidden_watch, last_block
from spdcli.engine.losses import attention_divergence
from spdcli.engine.masks import Noise, chunk_masks
from spdcli.engine.portion import Portion
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.tables import losses_where
from spdcli.engine.target import Target
from spdcli.engine.variants import Piece, Variant, chunks

ATTENDED = losses_where(lambda loss: loss.attended)  # of whose variants the attention loss compares the patterns


def row_costs(
    target: Target, slices: SliceSet, positions: int, hidden: bool = False, last: int | None = None
) -> list[float]:
    """Bytes that a row entering at block b, of so many `positions`, keeps for backward: element b of the list.

    It is an estimate, from the widths of the matrices from block b to block `last` (None: to the end); with `hidden`
    their outputs are compared too.
    """
    size = target.precision.itemsize
    width = target.unembedding.shape[1]
    per_block = [16.0 * width + 2 * positions for _ in target.blocks]
    for name, matrix in target.matrices.items():
        per_block[matrix.block] += 2 * matrix.d_in + (4 if hidden else 3) * matrix.d_out
        if name in slices.names:
            per_block[matrix.block] += 4 * slices.of(name).U.shape[1]
    stop = len(per_block) if last is None else last + 1
    return [size * positions * sum(per_block[block:stop]) for block in range(len(per_block))]


def reconstruction(
    target: Target,
    slices: SliceSet,
    clean: Clean,
    variants: list[Variant],
    g: Mapping[str, Tensor],
    noise: Noise,
    budget: float,
    consume: Callable[[Variant, slice, Tensor], Tensor | None],
    reverse: bool = False,
    attend: Callable[[Variant, Tensor], Tensor] | None = None,
    half: bool = False,
    look: Callable[[Variant, slice, Tensor], Tensor | None] | None = None,
    hidden_at: str = "matrix",
    hidden_scale: str = "position",
    portion: Portion | None = None,
) -> None:
    """Run all `variants` on the batch of a clean pass, in chunks of at most `budget` bytes, and hand over their KLs, or
    what else the target's `output_loss` is.

    Goes in: importances `g[m]` `[B, T, C]`, which masks start from (fixed variants need none), and `noise` for the
    sources that draw. Comes out, through `consume(variant, sequences, divergence)`: for some of a variant's sequences,
    given as a slice, the KL to the target in nats at every looked-at position, `[k]` in order; a variant may come in
    several parts. With `reverse` the KL is turned round. What `consume` returns, a number a call, is the share of the
    objective: the sum of a chunk's is sent backward before the next chunk is built, so that only one chunk's
    activations exist at a time; None sends nothing.

    `attend(variant, error)` gets likewise the attention errors of the variants of ATTENDED losses (see
    `attention_errors`), and `look(variant, sequences, errors)` the errors `[n]` of hidden activations at `hidden_at`, a
    key of `loss_choices.HIDDEN_SITES`, by `hidden_scale`, one of HIDDEN_SCALES beside it, of the variants of hidden
    losses (see `HiddenWatch.errors`), which need no KL. With `half` the blocks multiply in bfloat16. Of the variants
    this process's `portion` is run: the clean pass and g are of its sequences then, `variants` and their random numbers
    of the whole batch.
    """
    portion = portion or Portion(clean.batch)
    order = {variant: number for number, variant in enumerate(variants)}
    sequences, positions = portion.whole.valid.shape
    states = [*clean.entries, clean.exit]
    last = max((last_block(target, variant) for variant in variants), default=0)
    for whole in chunks(variants, sequences, row_costs(target, slices, positions, look is not None, last), budget):
        chunk = portion.pieces(whole, order)
        masks = chunk_masks(chunk, slices, g, noise)
        chunk = [piece for piece in chunk if len(piece)]
        if not chunk:
            continue
        watch = None
        if look is not None:
            valid = clean.batch.valid
            whole_valid = portion.whole.valid
            watch = hidden_watch(hidden_at, target, clean.inputs, states, valid, chunk, whole_valid, hidden_scale)
        narrow = torch.autocast(target.device.type, torch.bfloat16) if half else nullcontext()
        with recording(target, attend is not None) as patterns, narrow:
            ends = clean.at.ends and attend is None and look is None
            hidden = plan_pass(target, slices, clean, chunk, masks, ends, watch)
        terms = []
        if any(piece.variant.compares_outputs for piece in chunk):
            hidden = hidden.to(target.unembedding.dtype)
            terms += [
                consume(piece.variant, slice(piece.start, piece.stop), divergence)
                for piece, divergence in zip(chunk, row_divergences(target, clean, chunk, hidden, reverse), strict=True)
                if piece.variant.compares_outputs
            ]
        if attend is not None:
            terms += [attend(v, error) for v, error in attention_errors(clean, chunk, patterns)]
        if look is not None and watch is not None:
            terms += [look(*error) for error in watch.errors()]
        if terms[0] is not None:
            torch.stack(terms).sum().backward()  # type: ignore[arg-type]


def attention_errors(
    clean: Clean, chunk: Sequence[Piece], patterns: Sequence[Tensor]
) -> Iterator[tuple[Variant, Tensor]]:
    """How far the attention of variants is from the target's: for each piece of an ATTENDED loss, its variant and one
    number, KL(target ‖ variant) of the attention patterns in nats.

    The KL is a mean over blocks, heads and real queries, and a sum over the piece's sequences. `patterns[i]`
    `[R, H, T, T]` are log-probabilities of the chunk's rows in the i-th block of its plan pass, which begins at the
    chunk's first entry; blocks before a variant's own entry are the target's, and add nothing.
    """
    first_block, first = chunk[0].variant.entry, 0
    for piece in chunk:
        rows, first = slice(first, first + len(piece)), first + len(piece)
        if piece.variant.loss not in ATTENDED:
            continue
        real = clean.batch.valid[piece.start : piece.stop]
        total = patterns[0].new_zeros(())
        for block in range(piece.variant.entry, len(clean.patterns)):
            log_p = clean.patterns[block][piece.start : piece.stop]
            divergence = attention_divergence(log_p, patterns[block - first_block][rows]).mean(1)
            total = total + ((divergence * real).sum(1) / real.sum(1)).sum()
        yield piece.variant, total / len(clean.patterns)
