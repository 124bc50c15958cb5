"""The losses that run no variant: faithfulness of U and V, and what importances cost (Eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from spdcli.engine.portion import Portion
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.target import Target, sent


def exact_faithfulness(target: Target, slices: SliceSet) -> Tensor:
    """Faithfulness of all decomposed matrices, one number (Eq. 1)."""
    return faithfulness(_weights_and_slices(target, slices))


def exact_relative_faithfulness(target: Target, slices: SliceSet) -> Tensor:
    """Relative faithfulness, a mean over the decomposed matrices, one number."""
    return relative_faithfulness(_weights_and_slices(target, slices))


def drawn_signs(pairs: Pairs, probes: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random sign vectors `[probes, I]` for every matrix, drawn from `generator` on the CPU."""
    signs = {}
    for name, (weight, _, _) in pairs.items():
        bits = torch.randint(2, (probes, weight.shape[0]), generator=generator)
        signs[name] = sent((2 * bits - 1).to(weight.dtype), weight.device)
    return signs


def weight_errors(pairs: Pairs, own: Sequence[str], probes: int | None, generator: torch.Generator) -> list[Tensor]:
    """‖W - U V‖² of each matrix in `own` and 0 for the others, in their order: exact, or with `probes` an unbiased
    estimate by as many random sign vectors a matrix."""
    signs = None if probes is None else drawn_signs(pairs, probes, generator)
    mine = {name: pairs[name] for name in own}
    errors = dict(zip(mine, squared_errors(mine) if signs is None else probed_errors(mine, signs), strict=True))
    return [errors[name] if name in errors else weight.new_zeros(()) for name, (weight, _, _) in pairs.items()]


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
    portion: Portion | None = None,
) -> dict[str, Tensor]:
    """The losses of a step that run no variant, by name: those of the weights, and those of the importances g_upper
    `[B, T, C]` a matrix; arguments as in `step.backward_step`. Of each it is this process's part by `portion`, but for
    frequency by sequences, whose value is the whole (see `losses.frequency`)."""
    terms: dict[str, Tensor] = {}
    wanted = {name for name, coefficient in settings.coefficients.items() if coefficient > 0}
    if wanted & {"faithfulness", "relative_faithfulness"}:
        pairs, own = _weights_and_slices(target, slices), portion.weights(slices.names) if portion else slices.names
        errors = weight_errors(pairs, own, settings.faithfulness_probes, generator)
        if "faithfulness" in wanted:
            terms["faithfulness"] = mean_over_weights(errors, pairs)
        if "relative_faithfulness" in wanted:
            terms["relative_faithfulness"] = mean_over_matrices(errors, pairs)
    if wanted & {"minimality", "frequency"}:
        costs = penalties(upper, settings.penalty, annealed, settings.epsilon)
        positions, add_up = (None, None) if portion is None or portion.by_rows else (portion.positions, portion.add_up)
        nothing = torch.zeros((), device=valid.device)  # of a process without matrices
        if "minimality" in wanted:
            terms["minimality"] = minimality(costs, valid, positions) if costs else nothing
        if "frequency" in wanted:
            tokens = settings.frequency_tokens
            terms["frequency"] = frequency(costs, valid, tokens, positions, add_up) if costs else nothing
    return terms
