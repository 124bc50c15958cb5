"""The losses that run no variant: faithfulness of U and V, and what importances cost (Eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.losses import (
    Pairs,
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
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.target import Target, sent


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
    `[B, T, C]` a matrix; arguments as in `step.backward_step`."""
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
