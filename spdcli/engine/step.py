"""The losses of one step and their gradients: one pass over the plan (Algorithm 3, lines 3 to 9).

`backward_step` is the whole of it. B sequences, T positions, R rows of a chunk, C slices, H attention heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.engine.adversary import Consume, attacked
from spdcli.engine.direct_losses import direct_terms
from spdcli.engine.forward import Clean, plan_pass, recording, row_divergences
from spdcli.engine.hidden import hidden_watch, last_block
from spdcli.engine.loss_settings import ASCENDED, LossSettings
from spdcli.engine.losses import attention_divergence
from spdcli.engine.masks import Noise, chunk_masks
from spdcli.engine.portion import Portion
from spdcli.engine.subcomponents import Decomposition, SliceSet, detached
from spdcli.engine.tables import losses_where
from spdcli.engine.target import Target
from spdcli.engine.variants import Piece, Variant, chunks, draw_variants

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
    key of `loss_choices.HIDDEN_SITES`, by `hidden_scale`, one of `loss_choices.HIDDEN_SCALES`, of the variants of hidden
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
    losses = settings.reconstruction
    attention = settings.coefficients.get("attention", 0)
    names = [*losses, "attention"] if attention > 0 else losses
    sums = {name: torch.zeros((), dtype=torch.float64, device=target.device) for name in names}
    (sequences, positions), looked = portion.whole.valid.shape, len(portion.whole.looked_at.spots)

    def add(name: str, part: Tensor) -> Tensor:
        sums[name] += part.detach()
        return part * settings.coefficients[name]

    def consume(variant: Variant, part: slice, divergence: Tensor) -> Tensor:
        return add(variant.loss, divergence.sum() * (variant.weight / looked))

    def attend(variant: Variant, error: Tensor) -> Tensor:
        return add("attention", error * (variant.weight / sequences))

    def look(variant: Variant, part: slice, errors: Tensor) -> Tensor:
        assert variant.hidden is not None
        return add(variant.hidden, errors.sum() * (variant.weight / sequences))

    blocks = {name: target.matrices[name].block for name in decomposition.names}
    shape = (sequences, positions)
    variants = draw_variants(
        losses,
        blocks,
        settings.samples,
        settings.subset,
        shape,
        generator,
        settings.layerwise_matrices,
        settings.delta_mask,
        settings.delta_masks if decomposition.delta else "position",
    )
    if any(name in ASCENDED for name in losses):
        kept = {} if kept is None else kept
        variants = _attacked(target, decomposition, clean, variants, leaves, settings, noise, budget, kept, portion)
    reconstruction(
        target,
        decomposition,
        clean,
        variants,
        leaves,
        noise,
        budget,
        consume,
        settings.reverse_kl,
        attend if attention > 0 else None,
        settings.half,
        look if any(variant.hidden for variant in variants) else None,
        settings.hidden_at,
        settings.hidden_scale,
        portion,
    )
    return sums


def _attacked(
    target: Target,
    decomposition: Decomposition,
    clean: Clean,
    variants: list[Variant],
    leaves: Mapping[str, Tensor],
    settings: LossSettings,
    noise: Noise,
    budget: float,
    kept: MutableMapping[str, Tensor],
    portion: Portion,
) -> list[Variant]:
    """The `variants`, those of adversarial losses with the masks that an attack on the slices as they stand finds."""
    slices, g = detached(decomposition), {name: leaf.detach() for name, leaf in leaves.items()}

    def run(chosen: list[Variant], consume: Consume) -> None:
        reconstruction(
            target,
            slices,
            clean,
            chosen,
            g,
            noise,
            budget,
            consume,
            settings.reverse_kl,
            half=settings.half,
            portion=portion,
        )
        numbers = [t for variant in chosen for own in (variant.numbers or {}).values() for t in own if t.requires_grad]
        portion.processes.add_gradients(numbers)

    widths = {name: leaf.shape[-1] for name, leaf in g.items()}
    shape, like = portion.whole.valid.shape, next(iter(g.values()))
    return attacked(variants, settings.attack, widths, (shape[0], shape[1]), noise, like, run, kept)
