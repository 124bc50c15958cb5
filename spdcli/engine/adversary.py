"""Masks that an adversary picks: projected sign ascent (PGD) on the numbers that move masks from importance g to 1.

A mask is `g + (1 - g) * number`, the delta's is a number itself, and every number lies in [0, 1]. `begin` gives a
variant the numbers to start from, drawn or in a corner; `ascend` moves the numbers of several variants at once, all in
one plan, each along the sign of the gradient of its own KL:

    number <- clamp(number + size * sign(d KL / d number), 0, 1)

A worst case of several starts is so one call, in evaluation as in training:

    widths = {name: slices.of(name).U.shape[1] for name in slices.names}
    starts = [noise, noise, corner(0.0), corner(1.0)]                  # noise: a masks.Noise
    attacked = [begin(variant, widths, (1, 1), fill, like) for fill in starts]
    ascend(attacked, run, steps=20, size=0.1)
    run(attacked, consume)                                             # without a gradient: the KL of each

where `variant` is an ordinary one of the source "adversarial" and `run(variants, consume)` is `reconstruction`
with the rest of its arguments bound: slices that get no gradient (`subcomponents.detached`), importances g without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spdcli.engine.tables import SOURCES
from spdcli.engine.variants import Numbers, Piece, Variant

Fill = Callable[[Tensor, Piece, str, str], None]  # as masks.Noise: fills `out` for a matrix, of kind mask or delta
Consume = Callable[[Variant, slice, Tensor], Tensor | None]
Run = Callable[[list[Variant], Consume], None]


@dataclass(frozen=True)
class Attack:
    """How training finds the masks of its adversarial losses: a recipe's [adversary].

    `persistent`: the numbers are kept from step to step; else they are drawn anew. Either way they are ascended `steps`
    times by `size` before a step's losses. `shared`: one number a slice for all sequences and positions; else another
    at every position. `delta`: the delta's masks are ascended too; else they stay where they were drawn.
    """

    persistent: bool = False
    steps: int = 4
    size: float = 0.25
    shared: bool = True
    delta: bool = True


def corner(value: float) -> Fill:
    """Starts every number at `value`: 0 for masks of g and no delta, 1 for masks of 1 and the whole delta."""

    def fill(out: Tensor, piece: Piece, name: str, kind: str) -> None:
        out.fill_(value)

    return fill


def begin(
    variant: Variant,
    widths: Mapping[str, int],
    shape: tuple[int, int],
    fill: Fill,
    like: Tensor,
    attack_delta: bool = True,
) -> Variant:
    """`variant` with numbers to ascend from for each of its matrices, as `fill` starts them.

    `widths[m]` is C of matrix m. `shape` is (1, 1) for one number a slice, shared by all sequences and positions, or
    (B, T) for another at every position. `like` says on what device and of what type. Without `attack_delta` the masks
    of the delta stay where they start; a `delta` of the variant's own stays too, whatever this says.
    """
    piece, numbers = Piece(variant, 0, shape[0]), {}
    for name in sorted(variant.matrices):
        own = Numbers(like.new_empty(*shape, widths[name]), like.new_empty(*shape, 1))
        fill(own.mask, piece, name, "mask")
        fill(own.delta, piece, name, "delta")
        numbers[name] = Numbers(own.mask.requires_grad_(), own.delta.requires_grad_(attack_delta))
    return replace(variant, numbers=numbers)


def ascend(variants: Sequence[Variant], run: Run, steps: int, size: float) -> None:
    """Move the numbers of `variants` in place, so many `steps` of `size`, each variant's towards a larger KL.

    `run(variants, consume)` runs them and sends what `consume` returns backward. A number that the KL does not depend
    on stays.
    """
    moving = [t for v in variants for own in (v.numbers or {}).values() for t in own if t.requires_grad]
    for _ in range(steps):
        with torch.enable_grad():
            run(list(variants), lambda variant, part, divergence: divergence.sum())
        with torch.no_grad():
            for tensor in moving:
                if tensor.grad is not None:
                    tensor.add_(tensor.grad.sign(), alpha=size).clamp_(0, 1)
                    tensor.grad = None


def attacked(
    variants: Sequence[Variant],
    attack: Attack,
    widths: Mapping[str, int],
    batch_shape: tuple[int, int],
    fill: Fill,
    like: Tensor,
    run: Run,
    kept: MutableMapping[str, Tensor],
) -> list[Variant]:
    """The `variants`, in their order; those of an ascended source with numbers that `attack` found.

    `widths`, `fill` and `like` are as in `begin`, `run` as in `ascend`; `batch_shape` is (B, T). Where the attack is
    persistent it starts from the numbers `kept["loss.matrix.kind"]`, which are brought up to date.
    """

    def filled(out: Tensor, piece: Piece, name: str, kind: str) -> None:
        before = kept.get(f"{piece.variant.loss}.{name}.{kind}") if attack.persistent else None
        fill(out, piece, name, kind) if before is None else out.copy_(before)

    shape = (1, 1) if attack.shared else batch_shape
    chosen = [
        begin(variant, widths, shape, filled, like, attack.delta) if SOURCES[variant.source].ascended else variant
        for variant in variants
    ]
    begun = [variant for variant in chosen if variant.numbers is not None]
    if begun:
        ascend(begun, run, attack.steps, attack.size)
    for variant in begun:
        for name, numbers in (variant.numbers or {}).items():
            for kind, tensor in numbers._asdict().items():
                tensor.requires_grad_(False)
                if attack.persistent:
                    kept[f"{variant.loss}.{name}.{kind}"] = tensor
    return chosen
