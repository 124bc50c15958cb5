"""Which variants one step evaluates, as rows of one batch.

A *variant* is the target with some matrices replaced by masked slices. Every reconstruction loss (a row of
`tables.LOSSES` with a source and a scope) is a mean over some; each is run on all B sequences, so a plan of n variants
has n * B rows. Rows are ordered by the block at which they leave the target, so that the rows alive in a block are
always the first ones. B sequences, T positions, C slices, L matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spdcli.engine.loss_choices import DELTA_MASKS
from spdcli.engine.tables import LOSSES, SCOPES


class Numbers(NamedTuple):
    """How far the masks of a matrix are moved from the importance g towards 1, `mask` `[n, t, C]`, and the masks of its
    delta, `delta` `[n, t, 1]`; all in [0, 1]. n is B, or 1 where all sequences share them; t is T, or 1 where all
    positions do."""

    mask: Tensor
    delta: Tensor


@dataclass(frozen=True, eq=False)
class Variant:
    """The target with the `matrices` replaced by their masked slices, as one term of a loss.

    `loss`: the name of the loss that its KL is added to, times `weight` (the weights of a loss's variants sum to 1).
    `hidden`: the name of the loss that its hidden activations' error is added to, times `weight`; None: of none. It is
    `loss` itself where they are all that is compared.
    `entry`: the number of the first block that holds one of `matrices`; up to there it is the target.
    `source`: where its masks come from: a key of `tables.SOURCES`, or "fixed".
    `routed[m]`: `[B, T]` bool, the positions at which matrix m is replaced; None: everywhere.
    `fixed[m]`: `[C]`, the masks of matrix m at every position; of a fixed variant alone.
    `numbers[m]`: what moves the masks of matrix m, where they were found and not drawn: of an ascended source alone.
    `delta`: the mask of the delta W - U V, the part of a matrix that no slice holds. It multiplies the delta of every
    matrix at every position; with 1 the variant is the target minus what its masks take from the slices. If None, a
    variant of fixed masks has no delta, and in any other the source decides (importance: none; stochastic: U(0, 1)).
    `whole`: the variant of the whole batch, where this is one of a part of its sequences.
    """

    loss: str
    source: str
    matrices: frozenset[str]
    entry: int
    weight: float
    routed: Mapping[str, Tensor] | None = None
    fixed: Mapping[str, Tensor] | None = None
    delta: float | None = None
    numbers: Mapping[str, Numbers] | None = None
    hidden: str | None = None
    whole: Variant | None = None

    @property
    def compares_outputs(self) -> bool:
        """Whether its outputs are compared with the target's."""
        return self.loss != self.hidden


def fixed_variant(name: str, masks: Mapping[str, Tensor], blocks: Mapping[str, int], delta: float) -> Variant:
    """A variant with the same masks everywhere: `masks[m]` `[C]` for each replaced matrix m, in block `blocks[m]`."""
    entry = min(blocks[matrix] for matrix in masks)
    return Variant(name, "fixed", frozenset(masks), entry, 1.0, fixed=masks, delta=delta)


@dataclass(frozen=True, eq=False)
class Piece:
    """Sequences `start .. stop - 1` of one variant, the smallest thing a chunk is made of.

    `before` and `after` are how many sequences of the chunk other processes have of it on either side: what is drawn
    for them is passed over.
    """

    variant: Variant
    start: int
    stop: int
    before: int = 0
    after: int = 0

    def __len__(self) -> int:
        return self.stop - self.start


class Selection(NamedTuple):
    """The matrices that one variant replaces, and where: `routed[m]` `[B, T]` bool; None is everywhere."""

    matrices: Sequence[str]
    routed: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Drawing:
    """What a scope may read: a recipe's `subset` (forward or position) and `layerwise` (None: every matrix), the
    batch's `shape` (B, T), and where random numbers come from."""

    subset: str
    layerwise: int | None
    shape: tuple[int, int]
    generator: torch.Generator


def all_matrices(names: Sequence[str], drawing: Drawing) -> list[Selection]:
    """The scope "all": one selection of all L matrices `names` (Eq. 2, and L_recon of section 4)."""
    return [Selection(names)]


def each_alone(names: Sequence[str], drawing: Drawing) -> list[Selection]:
    """The scope "each": a selection a matrix (Eq. 3), or one for each of `layerwise` matrices drawn anew every time,
    whose mean is unbiased for that of all of them."""
    if drawing.layerwise is not None and drawing.layerwise < len(names):
        names = _drawn(names, drawing.layerwise, drawing.generator)
    return [Selection([name]) for name in names]


def random_subset(names: Sequence[str], drawing: Drawing) -> list[Selection]:
    """The scope "subset" (Eq. 5 and Eq. 7, Eq. 6 and Eq. 8): k uniform from 1 .. L, then k of the L matrices; one such
    selection, or (`subset` position) another one at every position."""
    if drawing.subset == "position":
        return [Selection(names, _routed_subset(names, drawing.shape, drawing.generator))]
    size = int(torch.randint(1, len(names) + 1, (), generator=drawing.generator))
    return [Selection(_drawn(names, size, drawing.generator))]


def draw_variants(
    losses: Iterable[str],
    blocks: Mapping[str, int],
    samples: int,
    subset: str,
    shape: tuple[int, int],
    generator: torch.Generator,
    layerwise: int | None = None,
    delta: float | None = None,
    delta_masks: str = "position",
) -> list[Variant]:
    """The variants whose mean is each of the reconstruction `losses` (names), ordered by the block they enter at.

    `blocks[m]` is the block of matrix m; all L matrices in it may be replaced. `shape` is (B, T). A loss whose source
    is sampled has `samples` times as many variants. `subset` and `layerwise` are for the scopes: see `random_subset`
    and `each_alone`. `delta` becomes that of every variant; where it is None, `delta_masks`, a key of
    `loss_choices.DELTA_MASKS`, says which have one drawn, and how. A hidden loss has no
    variants of its own beside the loss of outputs that it belongs to.
    """
    drawing, draws = Drawing(subset, layerwise, shape, generator), DELTA_MASKS[delta_masks]
    variants = []
    wanted = list(losses)
    looked_into = {LOSSES[name].hidden_of: name for name in wanted if LOSSES[name].hidden_of}
    for name in wanted:
        loss = LOSSES[name]
        if loss.hidden_of in wanted:
            continue  # it looks into the variants of that loss
        hidden = name if loss.hidden_of else looked_into.get(name)
        assert loss.source is not None
        assert loss.scope is not None
        scope, repeats = SCOPES[loss.scope].load(), samples if loss.sampled else 1
        drawn = delta is None and draws.code and (loss.sampled or (draws.everywhere and not loss.ascended))
        for _ in range(repeats):
            selections: list[Selection] = scope(list(blocks), drawing)
            weight = 1.0 / (repeats * len(selections))
            for matrices, routed in selections:
                entry = min(blocks[matrix] for matrix in matrices)
                own = draws.load()(generator) if drawn else delta
                variants.append(
                    Variant(name, loss.source, frozenset(matrices), entry, weight, routed, delta=own, hidden=hidden)
                )
    return sorted(variants, key=lambda variant: variant.entry)


def delta_anywhere(generator: torch.Generator) -> float:
    """A delta mask for a whole forward pass, uniform in [0, 1]."""
    return float(torch.rand((), generator=generator))


def delta_at_corners(generator: torch.Generator) -> float:
    """A delta mask for a whole forward pass: 0, 1 or uniform between them, a third of all draws each."""
    number = 3 * float(torch.rand((), generator=generator))
    return min(max(number - 1, 0.0), 1.0)


def _drawn(names: Sequence[str], size: int, generator: torch.Generator) -> list[str]:
    return [names[i] for i in torch.randperm(len(names), generator=generator)[:size].tolist()]


def _routed_subset(names: Sequence[str], shape: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    sizes = torch.randint(1, len(names) + 1, (*shape, 1), generator=generator)
    ranks = torch.rand(*shape, len(names), generator=generator).argsort(-1).argsort(-1)
    return dict(zip(names, (ranks < sizes).unbind(-1), strict=True))


def chunks(variants: Sequence[Variant], sequences: int, row_bytes: Sequence[float], budget: float) -> list[list[Piece]]:
    """Cut a plan of `variants` on so many `sequences` into chunks whose activations fit `budget` bytes.

    `row_bytes[b]` is what a row that enters at block b keeps for backward. A chunk has at least one row. A variant is
    cut between sequences only when it does not fit whole.
    """
    full: list[list[Piece]] = []
    current: list[Piece] = []
    room = budget
    for variant in variants:
        cost = row_bytes[variant.entry]
        whole = cost * sequences
        if current and whole > room:
            full.append(current)
            current, room = [], budget
        if whole <= room:
            current.append(Piece(variant, 0, sequences))
            room -= whole
            continue
        step = max(1, int(budget // cost))
        full += [[Piece(variant, start, min(start + step, sequences))] for start in range(0, sequences, step)]
    return [*full, current] if current else full
