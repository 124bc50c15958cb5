"""Masks in [g, 1] that a search by gradient makes as bad as it can: projected sign ascent on the KL to the target.

A decomposition claims that slices of importance 0 do not matter: that any mask m = g + (1 - g) r, with numbers r in
[0, 1], and any delta mask in [0, 1], leaves the target's predictions as they are. The search wants the r of the
largest KL. `shared`: one r a slice and one delta mask a matrix for all sequences and positions, as VPD's
`shared_across_batch`; else others at every position, which is the extreme.

    r <- clamp(r + size sign(dKL/dr), 0, 1), so many steps, from random starts and from the corners r = 0 and r = 1

With the delta attacked the last start is the target itself, whose slope is 0 but for rounding: any direction will do.

The KL is a mean over the positions looked at; of every start the largest one on its way counts, of an attack that of
its worst start. All starts go through the plan together. S starts, B sequences, T positions, C slices.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.engine.adversary import Consume, Fill, ascend, begin, corner
from spdcli.engine.forward import Clean, masked_logits
from spdcli.engine.masks import Noise, chunk_masks
from spdcli.engine.reconstruction import reconstruction
from spdcli.engine.subcomponents import SliceSet, detached
from spdcli.engine.target import Target
from spdcli.engine.variants import Piece, Variant
from spdcli.measures.answers import share_right
from spdcli.progress import Progress, Report, silent

ATTACK_BYTES = 2 * 2**30
CORNERS = (0.0, 1.0)  # starts beside the random ones: masks g with the delta off, and everything on


@dataclass(frozen=True)
class Budget:
    """What a search may do: `steps` steps of `size` from each of `starts` random starts and two corners.

    `delta`: whether the delta's masks are sought too; they are 0 otherwise. `shared`: see the module.
    """

    steps: int
    size: float
    starts: int
    delta: bool = True
    shared: bool = True


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What a search found, and its budget.

    `kl` is the largest KL(target ‖ variant) in nats, a mean over the positions looked at of `sequences` sequences;
    `kl_by_start` the largest of every start, the `starts` random ones first, then those from the corners r = 0 and
    r = 1. `accuracy` is the least share of sequences whose answer is told right after the last step, over all starts.
    """

    kl: float
    accuracy: float
    steps: int
    size: float
    starts: int
    delta: bool
    shared: bool
    sequences: int
    kl_by_start: Sequence[float]

    @property
    def allowed(self) -> str:
        """The budget in words."""
        where = "shared by all positions" if self.shared else "of their own at every position"
        delta = "delta attacked" if self.delta else "delta off"
        starts = f"{self.starts} random starts and {len(CORNERS)} corners"
        return f"{self.steps} steps of {self.size:g}, {starts}, masks {where}, {delta}, {self.sequences} sequences"


def attack(
    target: Target,
    slices: SliceSet,
    clean: Clean,
    g: Mapping[str, Tensor],
    answer_rows: Tensor,
    budget: Budget,
    seed: int,
    memory: float = ATTACK_BYTES,
    report: Report = silent,
) -> Attack:
    """Search on the batch of a clean pass, whose importances are `g[m]` `[B, T, C]`.

    `answer_rows` `[B]` says in which row of the looked-at positions each sequence's answer is predicted. `seed` draws
    the starts; a chunk of the plan takes at most `memory` bytes.
    """
    frozen = detached(slices)
    frozen.delta = budget.delta  # W - U V counts as a component whenever it is attacked
    noise = Noise(torch.Generator(target.device).manual_seed(seed))
    variants = _starts(target, frozen, clean, g, budget, noise)
    worst = _Worst(variants, len(clean.log_probs))
    done = itertools.count()

    def run(every: list[Variant], consume: Consume) -> None:
        report(Progress("steps of a search for masks that break it", next(done), budget.steps + 1))
        reconstruction(target, frozen, clean, every, g, noise, memory, worst.watching(consume))
        worst.keep()

    ascend(variants, run, budget.steps, budget.size)
    with torch.no_grad():
        run(variants, lambda variant, part, divergence: None)
        right = []
        for variant in variants:
            masks = chunk_masks([Piece(variant, 0, len(clean.batch.tokens))], frozen, g)
            right.append(share_right(masked_logits(target, frozen, clean, masks), answer_rows, clean.batch))
    return Attack(
        kl=max(worst.kl),
        accuracy=min(right),
        steps=budget.steps,
        size=budget.size,
        starts=budget.starts,
        delta=budget.delta,
        shared=budget.shared,
        sequences=len(clean.batch.tokens),
        kl_by_start=worst.kl,
    )


def _starts(
    target: Target, slices: SliceSet, clean: Clean, g: Mapping[str, Tensor], budget: Budget, noise: Noise
) -> list[Variant]:
    """A variant of all matrices a start, with the numbers that it starts from."""
    widths = {name: slices.of(name).U.shape[1] for name in slices.names}
    shape = (1, 1) if budget.shared else (clean.batch.tokens.shape[0], clean.batch.tokens.shape[1])
    entry = min(target.matrices[name].block for name in slices.names)
    whole = Variant("", "adversarial", frozenset(slices.names), entry, 1.0)
    fills: list[Fill] = [*[noise] * budget.starts, *map(corner, CORNERS)]
    like = next(iter(g.values()))
    return [begin(whole, widths, shape, fill, like, budget.delta) for fill in fills]


class _Worst:
    """The largest KL of every variant so far, `kl`, a mean over so many `looked`-at positions."""

    def __init__(self, variants: Sequence[Variant], looked: int) -> None:
        self.numbers = {variant: number for number, variant in enumerate(variants)}
        self.looked = looked
        self.now, self.kl = [0.0] * len(variants), [0.0] * len(variants)

    def watching(self, consume: Consume) -> Consume:
        """`consume`, with what it is given added up on the way."""

        def both(variant: Variant, part: slice, divergence: Tensor) -> Tensor | None:
            self.now[self.numbers[variant]] += divergence.detach().double().sum().item() / self.looked
            return consume(variant, part, divergence)

        return both

    def keep(self) -> None:
        """One run of all variants is over."""
        self.kl = [max(before, now) for before, now in zip(self.kl, self.now, strict=True)]
        self.now = [0.0] * len(self.now)
