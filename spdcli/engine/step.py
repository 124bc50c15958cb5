"""The losses of one step and their gradients: one pass over the plan (Algorithm 3, lines 2 to 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, plan_pass, recording, row_divergences
from spdcli.engine.losses import (
    RECONSTRUCTION,
    annealed_p,
    attention_divergence,
    faithfulness,
    minimality,
    probed_faithfulness,
)
from spdcli.engine.masks import Noise, chunk_masks
from spdcli.engine.subcomponents import Decomposition, SliceSet
from spdcli.engine.tables import losses_where
from spdcli.engine.target import Target, sent
from spdcli.engine.variants import Piece, Variant, chunks, draw_variants

ATTENDED = losses_where(lambda loss: loss.attended)  # of whose variants the attention loss compares the patterns


@dataclass(frozen=True)
class LossSettings:
    """`coefficients` by loss name (only those above 0 are evaluated); the rest as in a recipe's [losses].

    `layerwise_matrices` of the matrices, drawn every step, stand for all in the layerwise losses, and
    `faithfulness_probes` random vectors for the exact faithfulness; None is exact. With `half` the blocks of the plan
    pass multiply in bfloat16; importances and losses stay as they are.
    `delta_mask` is that of every variant; 0 leaves it to the masks' source.
    """

    coefficients: Mapping[str, float]
    samples: int = 1
    p_start: float = 0.9
    p_final: float = 0.1
    anneal_p: bool = True
    epsilon: float = 1e-12
    subset: str = "forward"
    reverse_kl: bool = False
    layerwise_matrices: int | None = None
    faithfulness_probes: int | None = None
    half: bool = False
    delta_mask: float = 0.0

    @property
    def reconstruction(self) -> list[str]:
        return [name for name in RECONSTRUCTION if self.coefficients.get(name, 0) > 0]

    def on_stream(self, share: float) -> LossSettings:
        """The losses of a targeted decomposition on broad text, `share` times those on the prompts.

        The delta stays fully on, so that a variant is the target minus what its masks take away: a slice that is not
        important there must not matter there, and has no way to bring in what the target does not do.
        """
        own = ("minimality", *RECONSTRUCTION)
        return replace(self, coefficients={n: share * self.coefficients.get(n, 0) for n in own}, delta_mask=1.0)

    def p(self, step: int, steps: int) -> float:
        """The power of minimality at `step` (from 0)."""
        return annealed_p(step, steps, self.p_start, self.p_final) if self.anneal_p else self.p_start


def row_costs(target: Target, slices: SliceSet, positions: int) -> list[float]:
    """Bytes that a row entering at block b keeps for backward: an estimate from the sizes of its matrices."""
    size = target.unembedding.element_size()
    width = target.unembedding.shape[1]
    per_block = [16.0 * width + 2 * positions for _ in target.blocks]
    for name, matrix in target.matrices.items():
        per_block[matrix.block] += 2 * matrix.d_in + 3 * matrix.d_out
        if name in slices.names:
            per_block[matrix.block] += 4 * slices.of(name).U.shape[1]
    return [size * positions * sum(per_block[block:]) for block in range(len(per_block))]


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
) -> None:
    """One pass over a plan, chunk by chunk.

    `g[m]` `[B, T, C]` are the importances masks are made of. For every piece of the plan, `consume` gets the
    variant, the sequences and their KLs (`[k]`, looked-at positions in order); what it returns is summed over the
    chunk and, unless None, sent backward before the next chunk is built. `attend` gets, for the variants of
    ATTENDED, the KL of their attention to the target's (see `attention_errors`), and is summed likewise.
    `half` is for the blocks alone.
    """
    sequences, positions = clean.batch.tokens.shape
    for chunk in chunks(variants, sequences, row_costs(target, slices, positions), budget):
        masks = chunk_masks(chunk, slices, g, noise)
        narrow = torch.autocast(target.device.type, torch.bfloat16) if half else nullcontext()
        with recording(target, attend is not None) as patterns, narrow:
            hidden = plan_pass(target, slices, clean, chunk, masks, ends=clean.at.ends and attend is None)
        hidden = hidden.to(target.unembedding.dtype)
        terms = [
            consume(piece.variant, slice(piece.start, piece.stop), divergence)
            for piece, divergence in zip(chunk, row_divergences(target, clean, chunk, hidden, reverse), strict=True)
        ]
        if attend is not None:
            terms += [attend(v, error) for v, error in attention_errors(clean, chunk, patterns)]
        if terms[0] is not None:
            torch.stack(terms).sum().backward()  # type: ignore[arg-type]


def attention_errors(
    clean: Clean, chunk: Sequence[Piece], patterns: Sequence[Tensor]
) -> Iterator[tuple[Variant, Tensor]]:
    """For each piece of a variant in ATTENDED: KL(target ‖ variant) of the attention, in nats (the attention loss adds
    those of all ATTENDED variants up).

    Summed over the piece's sequences, mean over blocks, heads and real queries. `patterns` are those of the plan
    pass, from the chunk's first block on; blocks before a variant's entry are the target's.
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


def exact_faithfulness(target: Target, slices: SliceSet) -> Tensor:
    """Faithfulness of all decomposed matrices (Eq. 1)."""
    return faithfulness(_weights_and_slices(target, slices))


def estimated_faithfulness(target: Target, slices: SliceSet, probes: int, generator: torch.Generator) -> Tensor:
    """Faithfulness by `probes` random sign vectors a matrix, drawn from `generator` on the CPU."""
    pairs = _weights_and_slices(target, slices)
    signs = {}
    for name, (weight, _, _) in pairs.items():
        drawn = torch.randint(2, (probes, weight.shape[0]), generator=generator)
        signs[name] = sent((2 * drawn - 1).to(weight.dtype), weight.device)
    return probed_faithfulness(pairs, signs)


def _weights_and_slices(target: Target, slices: SliceSet) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    return {name: (target.matrices[name].weight, slices.of(name).U, slices.of(name).V) for name in slices.names}


@dataclass(eq=False)
class Step:
    """The gradients of one step are in the parameters; `losses` are its terms, still on the device."""

    losses: dict[str, Tensor]
    active: dict[str, Tensor]


def backward_step(
    target: Target,
    decomposition: Decomposition,
    clean: Clean,
    settings: LossSettings,
    p: float,
    generator: torch.Generator,
    noise: Noise,
    budget: float,
) -> Step:
    """All losses of one step and their gradients: one pass over the plan, cut where memory asks for it.

    Backward runs chunk by chunk against detached importances; their summed gradient then goes through the importance
    functions once, together with faithfulness and minimality.
    """
    lower, upper = decomposition.importance(clean.inputs, clean.padding)
    leaves = {name: g.detach().requires_grad_() for name, g in lower.items()}
    terms = _plan_terms(target, decomposition, clean, leaves, settings, generator, noise, budget)
    direct: dict[str, Tensor] = {}
    if settings.coefficients.get("faithfulness", 0) > 0:
        probes = settings.faithfulness_probes
        direct["faithfulness"] = (
            exact_faithfulness(target, decomposition)
            if probes is None
            else estimated_faithfulness(target, decomposition, probes, generator)
        )
    if settings.coefficients.get("minimality", 0) > 0:
        direct["minimality"] = minimality(upper, clean.batch.valid, p, settings.epsilon)
    carried = [name for name in leaves if leaves[name].grad is not None]
    roots = [*(settings.coefficients[name] * term for name, term in direct.items()), *(lower[name] for name in carried)]
    if roots:
        gradients = [*(torch.ones_like(term) for term in direct.values()), *(leaves[name].grad for name in carried)]
        torch.autograd.backward(roots, gradients)
    valid = clean.batch.valid
    active = {name: ((g.detach() > 0).sum(-1) * valid).sum() / valid.sum() for name, g in lower.items()}
    return Step({name: term.detach() for name, term in (terms | direct).items()}, active)


def _plan_terms(
    target: Target,
    decomposition: Decomposition,
    clean: Clean,
    leaves: Mapping[str, Tensor],
    settings: LossSettings,
    generator: torch.Generator,
    noise: Noise,
    budget: float,
) -> dict[str, Tensor]:
    """Run the step's plan backward into the slices and the importances `leaves`; returns its loss terms, detached."""
    wanted = settings.reconstruction
    attention = settings.coefficients.get("attention", 0)
    names = [*wanted, "attention"] if attention > 0 else wanted
    sums = {name: torch.zeros((), dtype=torch.float64, device=target.device) for name in names}
    sequences, looked = len(clean.batch.tokens), clean.log_probs.shape[0]

    def add(name: str, share: Tensor) -> Tensor:
        sums[name] += share.detach()
        return share * settings.coefficients[name]

    def consume(variant: Variant, part: slice, divergence: Tensor) -> Tensor:
        return add(variant.loss, divergence.sum() * (variant.weight / looked))

    def attend(variant: Variant, error: Tensor) -> Tensor:
        return add("attention", error * (variant.weight / sequences))

    blocks = {name: target.matrices[name].block for name in decomposition.names}
    shape = (sequences, clean.batch.tokens.shape[1])
    variants = draw_variants(
        wanted,
        blocks,
        settings.samples,
        settings.subset,
        shape,
        generator,
        settings.layerwise_matrices,
        settings.delta_mask,
    )
    watch = attend if attention > 0 else None
    reverse = settings.reverse_kl
    reconstruction(
        target, decomposition, clean, variants, leaves, noise, budget, consume, reverse, watch, settings.half
    )
    return sums
