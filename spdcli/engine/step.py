"""The losses of one step and their gradients: one pass over the plan (Algorithm 3, lines 3 to 9).

`backward_step` is the whole of it. B sequences, T positions, R rows of a chunk, C slices, H attention heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spdcli.engine.adversary import Attack, Consume, attacked
from spdcli.engine.forward import Clean, plan_pass, recording, row_divergences
from spdcli.engine.hidden import hidden_watch
from spdcli.engine.losses import (
    RECONSTRUCTION,
    Pairs,
    annealed_value,
    attention_divergence,
    faithfulness,
    frequency,
    mean_over_matrices,
    mean_over_weights,
    minimality,
    penalties,
    probed_errors,
    relative_faithfulness,
    squared_errors,
)
from spdcli.engine.masks import Noise, chunk_masks
from spdcli.engine.subcomponents import Decomposition, SliceSet, detached
from spdcli.engine.tables import PENALTIES, losses_where
from spdcli.engine.target import Target, sent
from spdcli.engine.variants import Piece, Variant, chunks, draw_variants

ATTENDED = losses_where(lambda loss: loss.attended)  # of whose variants the attention loss compares the patterns
ASCENDED = losses_where(lambda loss: loss.ascended)


@dataclass(frozen=True)
class LossSettings:
    """Which losses a step has and how their masks are drawn: a recipe's [losses].

    `coefficients` are by name in `tables.LOSSES`; only those above 0 are evaluated. `samples` is S of Eq. 2; `penalty`,
    a key of `tables.PENALTIES`, is what minimality and frequency add up: its power p goes from `p_start` to `p_final`,
    or stays where it is without `anneal_p`, and `epsilon` is added to g before it; its gamma goes from `gamma_start` to
    `gamma_final`. `frequency_tokens` is n of `losses.frequency`; `subset` is a key of `tables.SUBSETS`; `reverse_kl` is
    KL(variant ‖ target). `layerwise_matrices` of the matrices, drawn every step, stand for all in the layerwise losses,
    and `faithfulness_probes` random vectors for the exact faithfulness; None is exact. With `half` the blocks of the
    plan pass multiply in bfloat16; importances and losses stay as they are. `delta_mask` is that of every variant; None
    leaves it to the masks' source, whose masks of the delta are drawn as `delta_masks`, a key of `tables.DELTA_MASKS`,
    says. `attack` finds adversarial masks.
    """

    coefficients: Mapping[str, float]
    samples: int = 1
    p_start: float = 0.9
    p_final: float = 0.1
    anneal_p: bool = True
    epsilon: float = 1e-12
    penalty: str = "power"
    gamma_start: float = 1.0
    gamma_final: float = 0.01
    frequency_tokens: float = 32768
    subset: str = "forward"
    reverse_kl: bool = False
    layerwise_matrices: int | None = None
    faithfulness_probes: int | None = None
    half: bool = False
    hidden_at: str = "matrix"
    delta_mask: float | None = None
    delta_masks: str = "position"
    attack: Attack = field(default_factory=Attack)

    @property
    def reconstruction(self) -> list[str]:
        """The names of the reconstruction losses that are evaluated."""
        return [name for name in RECONSTRUCTION if self.coefficients.get(name, 0) > 0]

    def on_stream(self, share: float) -> LossSettings:
        """The losses of a targeted decomposition on broad text, `share` times those on the prompts.

        The delta stays fully on, so that a variant is the target minus what its masks take away: a slice that is not
        important there must not matter there, and has no way to bring in what the target does not do. Adversaries look
        for their masks on the prompts alone.
        """
        own = ("minimality", "frequency", *(name for name in RECONSTRUCTION if name not in ASCENDED))
        return replace(self, coefficients={n: share * self.coefficients.get(n, 0) for n in own}, delta_mask=1.0)

    @property
    def anneals(self) -> str:
        """The name of the penalty's parameter that is annealed: p or gamma."""
        return PENALTIES[self.penalty].parameter

    def annealed(self, step: int, steps: int) -> float:
        """The penalty's p or gamma at `step` (from 0)."""
        if self.anneals == "gamma":
            return annealed_value(step, steps, self.gamma_start, self.gamma_final)
        return annealed_value(step, steps, self.p_start, self.p_final) if self.anneal_p else self.p_start


def row_costs(target: Target, slices: SliceSet, positions: int, hidden: bool = False) -> list[float]:
    """Bytes that a row entering at block b, of so many `positions`, keeps for backward: element b of the list.

    It is an estimate, from the widths of the matrices from block b on; with `hidden` their outputs are compared too.
    """
    size = target.unembedding.element_size()
    width = target.unembedding.shape[1]
    per_block = [16.0 * width + 2 * positions for _ in target.blocks]
    for name, matrix in target.matrices.items():
        per_block[matrix.block] += 2 * matrix.d_in + (4 if hidden else 3) * matrix.d_out
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
    look: Callable[[Variant, slice, Tensor], Tensor | None] | None = None,
    hidden_at: str = "matrix",
) -> None:
    """Run all `variants` on the batch of a clean pass, in chunks of at most `budget` bytes, and hand over their KLs.

    Goes in: importances `g[m]` `[B, T, C]`, which masks start from (fixed variants need none), and `noise` for the
    sources that draw. Comes out, through `consume(variant, sequences, divergence)`: for some of a variant's sequences,
    given as a slice, the KL to the target in nats at every looked-at position, `[k]` in order; a variant may come in
    several parts. With `reverse` the KL is turned round. What `consume` returns, a number a call, is the share of the
    objective: the sum of a chunk's is sent backward before the next chunk is built, so that only one chunk's
    activations exist at a time; None sends nothing.

    `attend(variant, error)` gets likewise the attention errors of the variants of ATTENDED losses (see
    `attention_errors`), and `look(variant, sequences, errors)` the errors `[n]` of hidden activations at `hidden_at`, a
    key of `tables.HIDDEN_SITES`, of the variants of hidden losses (see `hidden.HiddenWatch.errors`), which need no KL.
    With `half` the blocks multiply in bfloat16.
    """
    sequences, positions = clean.batch.tokens.shape
    states = [*clean.entries, clean.exit]
    for chunk in chunks(variants, sequences, row_costs(target, slices, positions, look is not None), budget):
        masks = chunk_masks(chunk, slices, g, noise)
        watch = None
        if look is not None:
            watch = hidden_watch(hidden_at, target, clean.inputs, states, clean.batch.valid, chunk)
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


def exact_faithfulness(target: Target, slices: SliceSet) -> Tensor:
    """Faithfulness of all decomposed matrices, one number (Eq. 1)."""
    return faithfulness(_weights_and_slices(target, slices))


def exact_relative_faithfulness(target: Target, slices: SliceSet) -> Tensor:
    """Relative faithfulness, a mean over the decomposed matrices, one number."""
    return relative_faithfulness(_weights_and_slices(target, slices))


def estimated_errors(pairs: Pairs, probes: int, generator: torch.Generator) -> list[Tensor]:
    """Unbiased estimates of every matrix's ‖W - U V‖², by `probes` random sign vectors a matrix, drawn from `generator`
    on the CPU."""
    signs = {}
    for name, (weight, _, _) in pairs.items():
        bits = torch.randint(2, (probes, weight.shape[0]), generator=generator)
        signs[name] = sent((2 * bits - 1).to(weight.dtype), weight.device)
    return probed_errors(pairs, signs)


def _weights_and_slices(target: Target, slices: SliceSet) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    return {name: (target.matrices[name].weight, slices.of(name).U, slices.of(name).V) for name in slices.names}


@dataclass(eq=False)
class Step:
    """What a step tells, on the device still: every loss before its coefficient, and the mean number of active slices
    (g > 0) at a real position, by matrix."""

    losses: dict[str, Tensor]
    active: dict[str, Tensor]


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
) -> Step:
    """One training step without its update (Algorithm 3, lines 3 to 9): all losses, and their gradients.

    Goes in: the clean pass of a minibatch; `settings`, which losses and how much of each; `annealed`, the power p of
    minimality or its smooth penalty's gamma; the `generator` that matrices and subsets are drawn from and the `noise`
    that masks are; the `budget` in bytes that the activations of one chunk of variants may take; the numbers `kept` of
    a persistent adversary, which are brought up to date (see `adversary.attacked`). Comes out: a `Step`; the gradient
    of the objective, the sum of coefficient times loss, is *added* to `.grad` of all U, V and importance functions.

    How: backward runs chunk by chunk against detached importances `[B, T, C]`, whose summed gradient then goes through
    the importance functions once, together with faithfulness and minimality. The result is that of one backward
    through everything.
    """
    lower, upper = decomposition.importance(clean.inputs, clean.padding)
    leaves = {name: g.detach().requires_grad_() for name, g in lower.items()}
    terms = _plan_terms(target, decomposition, clean, leaves, settings, generator, noise, budget, kept)
    direct = direct_terms(target, decomposition, upper, clean.batch.valid, settings, annealed, generator)
    carried = [name for name in leaves if leaves[name].grad is not None]
    roots = [*(settings.coefficients[name] * term for name, term in direct.items()), *(lower[name] for name in carried)]
    if roots:
        gradients = [*(torch.ones_like(term) for term in direct.values()), *(leaves[name].grad for name in carried)]
        torch.autograd.backward(roots, gradients)
    valid = clean.batch.valid
    active = {name: ((g.detach() > 0).sum(-1) * valid).sum() / valid.sum() for name, g in lower.items()}
    return Step({name: term.detach() for name, term in (terms | direct).items()}, active)


def direct_terms(
    target: Target,
    slices: SliceSet,
    upper: Mapping[str, Tensor],
    valid: Tensor,
    settings: LossSettings,
    annealed: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The losses of a step that run no variant, by name: those of the weights, and those of the importances g_upper
    `[B, T, C]` a matrix; arguments as in `backward_step`."""
    terms: dict[str, Tensor] = {}
    wanted = {name for name, coefficient in settings.coefficients.items() if coefficient > 0}
    if wanted & {"faithfulness", "relative_faithfulness"}:
        pairs, probes = _weights_and_slices(target, slices), settings.faithfulness_probes
        errors = squared_errors(pairs) if probes is None else estimated_errors(pairs, probes, generator)
        if "faithfulness" in wanted:
            terms["faithfulness"] = mean_over_weights(errors, pairs)
        if "relative_faithfulness" in wanted:
            terms["relative_faithfulness"] = mean_over_matrices(errors, pairs)
    if wanted & {"minimality", "frequency"}:
        costs = penalties(upper, settings.penalty, annealed, settings.epsilon)
        if "minimality" in wanted:
            terms["minimality"] = minimality(costs, valid)
        if "frequency" in wanted:
            terms["frequency"] = frequency(costs, valid, settings.frequency_tokens)
    return terms


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
) -> dict[str, Tensor]:
    """The losses of the step's variants, detached, by name; their gradients are added to `.grad` of the slices and of
    the importances `leaves[m]` `[B, T, C]`."""
    losses = settings.reconstruction
    attention = settings.coefficients.get("attention", 0)
    names = [*losses, "attention"] if attention > 0 else losses
    sums = {name: torch.zeros((), dtype=torch.float64, device=target.device) for name in names}
    sequences, looked = len(clean.batch.tokens), clean.log_probs.shape[0]

    def add(name: str, share: Tensor) -> Tensor:
        sums[name] += share.detach()
        return share * settings.coefficients[name]

    def consume(variant: Variant, part: slice, divergence: Tensor) -> Tensor:
        return add(variant.loss, divergence.sum() * (variant.weight / looked))

    def attend(variant: Variant, error: Tensor) -> Tensor:
        return add("attention", error * (variant.weight / sequences))

    def look(variant: Variant, part: slice, errors: Tensor) -> Tensor:
        assert variant.hidden is not None
        return add(variant.hidden, errors.sum() * (variant.weight / sequences))

    blocks = {name: target.matrices[name].block for name in decomposition.names}
    shape = (sequences, clean.batch.tokens.shape[1])
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
        variants = _attacked(target, decomposition, clean, variants, leaves, settings, noise, budget, kept)
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
) -> list[Variant]:
    """The `variants`, those of adversarial losses with the masks that an attack on the slices as they stand finds."""
    slices, g = detached(decomposition), {name: leaf.detach() for name, leaf in leaves.items()}

    def run(chosen: list[Variant], consume: Consume) -> None:
        reconstruction(
            target, slices, clean, chosen, g, noise, budget, consume, settings.reverse_kl, half=settings.half
        )

    widths = {name: leaf.shape[-1] for name, leaf in g.items()}
    shape, like = clean.batch.tokens.shape, next(iter(g.values()))
    return attacked(variants, settings.attack, widths, (shape[0], shape[1]), noise, like, run, kept)
