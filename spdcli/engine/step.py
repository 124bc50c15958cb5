"""The losses of one step and their gradients: one pass over the plan (Algorithm 3, lines 3 to 9).

`backward_step` is the whole of it. B sequences, T positions, C slices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from spdcli.engine.adversary import Consume, attacked
from spdcli.engine.direct_losses import direct_terms
from spdcli.engine.forward import Clean
from spdcli.engine.loss_settings import ASCENDED, LossSettings
from spdcli.engine.masks import Noise
from spdcli.engine.portion import Portion
from spdcli.engine.reconstruction import reconstruction
from spdcli.engine.subcomponents import Decomposition, detached
from spdcli.engine.target import Target
from spdcli.engine.variants import Variant, draw_variants


@dataclass(eq=False)
class Step:
    """What a step tells, on the device still: every loss before its coefficient; and at how many of the `positions`
    that are real each slice is active (g > 0), `[C]` a matrix."""

    losses: dict[str, Tensor]
    counts: dict[str, Tensor]
    positions: Tensor

    @property
    def active(self) -> dict[str, Tensor]:
        """The mean number of active slices at a real position, by matrix."""
        return {name: count.long().sum() / self.positions for name, count in self.counts.items()}

    @property
    def always_on(self) -> dict[str, Tensor]:
        """How many slices are active at every real position, by matrix."""
        return {name: (count == self.positions).sum() for name, count in self.counts.items()}


def backward_step(
    target: Target,
    decomposition: Decomposition,
    clean: Clean,
    settings: LossSettings,
    annealed: float,
    generator: torch.Generator,
    noise: Noise,
    budget: float,
    kept: MutableMapping[str, Tensor] | None = None,
    portion: Portion | None = None,
) -> Step:
    """One training step without its update (Algorithm 3, lines 3 to 9): all losses, and their gradients.

    Goes in: the clean pass of a minibatch; `settings`, which losses and how much of each; `annealed`, the power p of
    minimality or its smooth penalty's gamma; the `generator` that matrices and subsets are drawn from and the `noise`
    that masks are; the `budget` in bytes that the activations of one chunk of variants may take; the numbers `kept` of
    a persistent adversary, which are brought up to date (see `adversary.attacked`). Comes out: a `Step`; the gradient
    of the objective, the sum of coefficient times loss, is *added* to `.grad` of all U, V and importance functions.
    With a `portion` the clean pass is of its sequences, and what comes out, `Step.positions` apart, is this process's
    part: it sums to the whole over all processes.

    How: backward runs chunk by chunk against detached importances `[B, T, C]`, whose summed gradient then goes through
    the importance functions once, together with faithfulness and minimality. The result is that of one backward
    through everything.
    """
    portion = portion or Portion(clean.batch)
    lower, upper = decomposition.importance(clean.inputs, clean.padding)
    leaves = {name: g.detach().requires_grad_() for name, g in lower.items()}
    terms = _plan_terms(target, decomposition, clean, leaves, settings, generator, noise, budget, kept, portion)
    if portion.by_rows:
        portion.processes.add_gradients(leaves.values())  # the leaky sigmoid answers to the sign of a sum
    own, valid = portion.gates(decomposition.names), clean.batch.valid
    upper = {name: upper[name] for name in own}
    direct = direct_terms(target, decomposition, upper, valid, settings, annealed, generator, portion)
    trained = {name: term for name, term in direct.items() if term.requires_grad}
    carried = [name for name in own if leaves[name].grad is not None]
    roots = [*(settings.coefficients[n] * term for n, term in trained.items()), *(lower[name] for name in carried)]
    if roots:
        gradients = [*(torch.ones_like(term) for term in trained.values()), *(leaves[name].grad for name in carried)]
        torch.autograd.backward(roots, gradients)
    real = valid.flatten().float()  # as a product, which is faster than a sum of booleans
    counts = {name: real @ (lower[name].detach() > 0).flatten(0, 1).float() for name in own}
    counts = {name: counts.get(name, real.new_zeros(g.shape[-1])) for name, g in lower.items()}
    losses = {name: portion.of_loss(name, term.detach()) for name, term in (terms | direct).items()}
    return Step(losses, counts, portion.positions)


@dataclass(eq=False)
class _PlanSums:
    """The losses of a step's variants, summed over the parts of them that come in as `reconstruction` hands them over.

    `losses` are detached, by name; each method returns what goes backward, the part times its coefficient. A loss is a
    mean over `sequences`, those of attention and hidden activations, or over `looked` positions, those of outputs.
    """

    losses: dict[str, Tensor]
    coefficients: Mapping[str, float]
    sequences: int
    looked: int

    def add(self, name: str, part: Tensor) -> Tensor:
        self.losses[name] += part.detach()
        return part * self.coefficients[name]

    def consume(self, variant: Variant, part: slice, divergence: Tensor) -> Tensor:
        return self.add(variant.loss, divergence.sum() * (variant.weight / self.looked))

    def attend(self, variant: Variant, error: Tensor) -> Tensor:
        return self.add("attention", error * (variant.weight / self.sequences))

    def look(self, variant: Variant, part: slice, errors: Tensor) -> Tensor:
        assert variant.hidden is not None
        return self.add(variant.hidden, errors.sum() * (variant.weight / self.sequences))


def _plan_terms(
    target: Target,
    decomposition: Decomposition,
    clean: Clean,
    leaves: Mapping[str, Tensor],
    settings: LossSettings,
    generator: torch.Generator,
    noise: Noise,
    budget: float,
    kept: MutableMapping[str, Tensor] | None,
    portion: Portion,
) -> dict[str, Tensor]:
    """The losses of the step's variants, detached, by name; their gradients are added to `.grad` of the slices and of
    the importances `leaves[m]` `[B, T, C]`."""
    attends = settings.coefficients.get("attention", 0) > 0
    names = [*settings.reconstruction, "attention"] if attends else settings.reconstruction
    zeros = {name: torch.zeros((), dtype=torch.float64, device=target.device) for name in names}
    sequences, looked = len(portion.whole.valid), len(portion.whole.looked_at.spots)
    sums = _PlanSums(zeros, settings.coefficients, sequences, looked)
    run = partial(
        reconstruction,
        target,
        clean=clean,
        noise=noise,
        budget=budget,
        reverse=settings.reverse_kl,
        half=settings.half,
        portion=portion,
    )
    variants = _drawn(target, decomposition, settings, generator, portion)
    if any(name in ASCENDED for name in settings.reconstruction):
        variants = _attacked(variants, decomposition, leaves, settings, noise, kept, portion, run)
    run(
        decomposition,
        variants=variants,
        g=leaves,
        consume=sums.consume,
        attend=sums.attend if attends else None,
        look=sums.look if any(variant.hidden for variant in variants) else None,
        hidden_at=settings.hidden_at,
        hidden_scale=settings.hidden_scale,
    )
    return sums.losses


def _drawn(
    target: Target,
    decomposition: Decomposition,
    settings: LossSettings,
    generator: torch.Generator,
    portion: Portion,
) -> list[Variant]:
    """The step's variants of the whole batch, as `draw_variants` draws them."""
    sequences, positions = portion.whole.valid.shape
    return draw_variants(
        settings.reconstruction,
        {name: target.matrices[name].block for name in decomposition.names},
        settings.samples,
        settings.subset,
        (sequences, positions),
        generator,
        settings.layerwise_matrices,
        settings.delta_mask,
        settings.delta_masks if decomposition.delta else "position",
    )


def _attacked(
    variants: list[Variant],
    decomposition: Decomposition,
    leaves: Mapping[str, Tensor],
    settings: LossSettings,
    noise: Noise,
    kept: MutableMapping[str, Tensor] | None,
    portion: Portion,
    run: Callable[..., None],
) -> list[Variant]:
    """The `variants`, those of adversarial losses with the masks that an attack on the slices as they stand finds.

    `run` is `reconstruction` with what all of a step's plans share; what a persistent adversary has is `kept`.
    """
    slices, g = detached(decomposition), {name: leaf.detach() for name, leaf in leaves.items()}

    def run_detached(chosen: list[Variant], consume: Consume) -> None:
        run(slices, variants=chosen, g=g, consume=consume)
        numbers = [t for variant in chosen for own in (variant.numbers or {}).values() for t in own if t.requires_grad]
        portion.processes.add_gradients(numbers)

    widths = {name: leaf.shape[-1] for name, leaf in g.items()}
    (sequences, positions), like = portion.whole.valid.shape, next(iter(g.values()))
    kept = {} if kept is None else kept
    return attacked(variants, settings.attack, widths, (sequences, positions), noise, like, run_detached, kept)
