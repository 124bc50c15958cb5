"""Which variants one step evaluates, as rows of one batch.

A *variant* is the target with some matrices replaced by masked slices. Every reconstruction loss asks for
some; each is run on all B sequences, so a plan of n variants has n * B rows. Rows are ordered by the
block at which they leave the target, so that the rows alive in a block are always the first ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.engine.losses import RECONSTRUCTION


@dataclass(frozen=True, eq=False)
class Variant:
    """One masked target of a plan.

    `loss` is the loss it counts for, `weight` its share of that loss's mean, `entry` the first block that differs
    from the target. `source` says what its masks are: importance, stochastic, or fixed. `routed[m]` `[B, T]` says
    where matrix m is replaced, when that differs by position; None means everywhere. A fixed variant has one mask
    `fixed[m]` `[C]` for every position. `delta` is the delta mask of a variant: with 1 it is the target minus what its
    masks take from the slices; with 0 a fixed variant is made of slices alone, and the others have the delta's mask
    by their source.
    """

    loss: str
    source: str
    matrices: frozenset[str]
    entry: int
    weight: float
    routed: Mapping[str, Tensor] | None = None
    fixed: Mapping[str, Tensor] | None = None
    delta: float = 0.0


def fixed_variant(name: str, masks: Mapping[str, Tensor], blocks: Mapping[str, int], delta: float) -> Variant:
    """A variant with the same masks everywhere: `masks[m]` `[C]` for each replaced matrix m, in block `blocks[m]`."""
    entry = min(blocks[matrix] for matrix in masks)
    return Variant(name, "fixed", frozenset(masks), entry, 1.0, fixed=masks, delta=delta)


@dataclass(frozen=True, eq=False)
class Piece:
    """Sequences `start .. stop - 1` of one variant, the smallest thing a chunk is made of."""

    variant: Variant
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def draw_variants(
    wanted: Iterable[str],
    blocks: Mapping[str, int],
    samples: int,
    subset: str,
    shape: tuple[int, int],
    generator: torch.Generator,
    layerwise: int | None = None,
    delta: float = 0.0,
) -> list[Variant]:
    """The variants of the losses `wanted`, ordered by entry.

    `blocks[m]` is the block of matrix m, `shape` is `(B, T)`. Layerwise losses give one variant a matrix, or one for
    each of `layerwise` matrices drawn anew every time, whose mean is unbiased for that of all of them; a
    partial loss draws k uniformly from 1 .. L and then k of the L matrices, once a variant (`subset`
    forward, Eq. 5 and 6) or once a position (`subset` position). Stochastic losses are drawn `samples` times.
    `delta` is that of every variant.
    """
    variants = []
    for loss in wanted:
        source, scope = RECONSTRUCTION[loss]
        repeats = samples if source == "stochastic" else 1
        for _ in range(repeats):
            if scope == "all":
                chosen: list[tuple[Iterable[str], Mapping[str, Tensor] | None]] = [(blocks, None)]
            elif scope == "each":
                names = list(blocks)
                if layerwise is not None and layerwise < len(names):
                    names = _drawn(names, layerwise, generator)
                chosen = [([name], None) for name in names]
            elif subset == "position":
                chosen = [(blocks, _routed_subset(list(blocks), shape, generator))]
            else:
                chosen = [(_random_subset(list(blocks), generator), None)]
            weight = 1.0 / (repeats * len(chosen))
            for matrices, routed in chosen:
                replaced = frozenset(matrices)
                entry = min(blocks[name] for name in replaced)
                variants.append(Variant(loss, source, replaced, entry, weight, routed, delta=delta))
    return sorted(variants, key=lambda variant: variant.entry)


def _random_subset(names: Sequence[str], generator: torch.Generator) -> list[str]:
    return _drawn(names, int(torch.randint(1, len(names) + 1, (), generator=generator)), generator)


def _drawn(names: Sequence[str], size: int, generator: torch.Generator) -> list[str]:
    return [names[i] for i in torch.randperm(len(names), generator=generator)[:size].tolist()]


def _routed_subset(names: Sequence[str], shape: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    sizes = torch.randint(1, len(names) + 1, (*shape, 1), generator=generator)
    ranks = torch.rand(*shape, len(names), generator=generator).argsort(-1).argsort(-1)
    return dict(zip(names, (ranks < sizes).unbind(-1), strict=True))


def chunks(variants: Sequence[Variant], sequences: int, row_bytes: Sequence[float], budget: float) -> list[list[Piece]]:
    """Cut a plan into chunks whose activations fit `budget` bytes; a chunk has at least one row.

    `row_bytes[b]` is what a row that enters at block b keeps for backward. A variant is cut between
    sequences only when it does not fit whole.
    """
    done: list[list[Piece]] = []
    current: list[Piece] = []
    room = budget
    for variant in variants:
        cost = row_bytes[variant.entry]
        whole = cost * sequences
        if current and whole > room:
            done.append(current)
            current, room = [], budget
        if whole <= room:
            current.append(Piece(variant, 0, sequences))
            room -= whole
            continue
        step = max(1, int(budget // cost))
        done += [[Piece(variant, start, min(start + step, sequences))] for start in range(0, sequences, step)]
    return [*done, current] if current else done
