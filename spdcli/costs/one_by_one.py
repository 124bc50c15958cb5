"""The obvious way to make a step, which the plan pass is measured against: every variant is a run of the whole model.

It computes the same losses and gradients as `engine.step.backward_step`: the matrices of a variant are replaced while
the target runs from its embedding to the logits of every position; KLs come from two log-softmaxes, all losses are
added up, and one backward goes through all of it. While `whole_gates()` is open the gate network's hidden layer is
made whole too, as three lines of PyTorch would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spdcli.engine import importance
from spdcli.engine.direct_losses import direct_terms
from spdcli.engine.fit import FitSettings, FitState
from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.masks import Noise, chunk_masks
from spdcli.engine.optimise import set_rate
from spdcli.engine.part_tables import ACTIVATIONS
from spdcli.engine.replacement import replaced
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Batches, Target, log_probabilities
from spdcli.engine.variants import Piece, Variant, draw_variants


def one_by_one_step(
    target: Target,
    decomposition: Decomposition,
    clean: Clean,
    settings: LossSettings,
    annealed: float,
    variants: Sequence[Variant],
    noise: Noise,
) -> dict[str, Tensor]:
    """The losses of a step on `variants`, by name, but for hidden ones; their gradients are added to `.grad` of the
    parameters."""
    batch = clean.batch
    lower, upper = decomposition.importance(clean.inputs, clean.padding)
    losses: dict[str, Tensor] = {}
    for variant in variants:
        piece = Piece(variant, 0, len(batch.tokens))
        with replaced(target, decomposition, chunk_masks([piece], decomposition, lower, noise)):
            log_q = log_probabilities(whole_run(target, batch.tokens))[batch.looked]
        first, second = (log_q, clean.log_probs) if settings.reverse_kl else (clean.log_probs, log_q)
        divergence = (first.exp() * (first - second)).sum(-1).mean() * variant.weight
        losses[variant.loss] = losses.get(variant.loss, 0) + divergence
    exact = replace(settings, faithfulness_probes=None)
    losses |= direct_terms(target, decomposition, upper, batch.valid, exact, annealed, torch.Generator())
    torch.stack([settings.coefficients[name] * loss for name, loss in losses.items()]).sum().backward()
    return {name: loss.detach() for name, loss in losses.items()}


def whole_run(target: Target, tokens: Tensor) -> Tensor:
    """The target's logits at every position, `[B, T, N]`."""
    last: list[Any] = []
    handle = target.blocks[-1].register_forward_hook(lambda module, args, output: last.append(output))
    try:
        target.run(tokens)
    finally:
        handle.remove()
    hidden = last[0][0] if isinstance(last[0], tuple) else last[0]
    return target.outputs(hidden)


def whole_vector_gates(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """`engine.gates.vector_gates` with the hidden layer `[N, G, C]` made whole and left to autograd."""
    hidden = (x @ w1 + b1).unflatten(-1, w2.shape)
    return torch.einsum("ngc,gc->nc", ACTIVATIONS[activation].load().value(hidden), w2) + b2


def whole_scalar_gates(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """`engine.gates.scalar_gates` with the hidden layer `[N, G, C]` made whole and left to autograd."""
    hidden = x[:, None] * w1 + b1
    return torch.einsum("ngc,gc->nc", ACTIVATIONS[activation].load().value(hidden), w2) + b2


@contextmanager
def whole_gates() -> Iterator[None]:
    """While open, importance functions use the two functions above in place of the engine's kernels."""
    plain = {"vector_gates": whole_vector_gates, "scalar_gates": whole_scalar_gates}
    kernels = {name: getattr(importance, name) for name in plain}
    try:
        for name, function in plain.items():
            setattr(importance, name, function)
        yield
    finally:
        for name, function in kernels.items():
            setattr(importance, name, function)


def fit_one_by_one(
    target: Target,
    decomposition: Decomposition,
    batches: Batches,
    state: FitState,
    settings: FitSettings,
) -> Iterator[dict[str, Tensor]]:
    """As `engine.fit.fit`, with every step one by one; yields the losses of each step."""
    noise = Noise(state.generators["noise"])
    blocks = {name: target.matrices[name].block for name in decomposition.names}
    losses = settings.losses
    while state.step < settings.steps:
        batch = batches(state.generators["data"], state.step)
        clean = clean_pass(target, batch, decomposition.names)
        generator, shape = state.generators["plan"], (len(clean.batch.tokens), clean.batch.tokens.shape[1])
        delta_masks = losses.delta_masks if decomposition.delta else "position"
        variants = draw_variants(
            losses.reconstruction,
            blocks,
            losses.samples,
            losses.subset,
            shape,
            generator,
            delta_masks=delta_masks,
        )
        state.optimiser.zero_grad(set_to_none=True)
        annealed = losses.annealed(state.step, settings.steps)
        values = one_by_one_step(target, decomposition, clean, losses, annealed, variants, noise)
        for group, limit in zip(state.optimiser.param_groups, (settings.clip_slices, settings.clip_gates), strict=True):
            torch.nn.utils.clip_grad_norm_(group["params"], limit or math.inf)
        set_rate(state.optimiser, state.schedule, state.step)
        state.optimiser.step()
        state.step += 1
        yield values
