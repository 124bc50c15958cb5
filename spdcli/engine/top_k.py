"""Attribution-based parameter decomposition (APD) in rank-1 slices: gradients say which are on, nothing learns it.

Of a batch the slices with the largest attributions are on, a set number a position on average, the others off:

    attribution   of slice c of matrix m at position t: the sum over outputs o of (d f_o / d mask_c)^2 at the target,
                  d f_o / d mask_c = (x_t . U_c) (V_c . d f_o / d y_t), y what m writes
    objective     KL(target ‖ slices that are on) + faithfulness + simplicity, the latter the mean over positions of
                  the sum over slices that are on of the Schatten p-norm to the power p, (|U_c| |V_c|)^p

The sum over outputs is estimated by random signs e: E (sum_o e_o d f_o / d y)^2 is the sum of squares. It is the
baseline that SPD is set beside. B sequences, T positions, I d_in, O d_out, C slices, N outputs, n positions looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spdcli.engine.direct_losses import exact_faithfulness
from spdcli.engine.forward import Clean, clean_pass, plan_pass, row_divergences
from spdcli.engine.masks import importance_masks
from spdcli.engine.optimise import OptimiserSettings, make_optimiser, set_rate
from spdcli.engine.rows import hidden_of
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.target import Batch, Batches, Target
from spdcli.engine.variants import Piece, Variant


@dataclass(frozen=True)
class TopKSettings:
    """`active` slices are on at a position, over all matrices, on average; attributions are a mean over `probes` draws
    of signs. `faithfulness` and `simplicity` are coefficients, `p` the power of simplicity."""

    active: float
    faithfulness: float
    simplicity: float
    p: float = 0.9
    probes: int = 4


def fit_top_k(
    target: Target,
    slices: SliceSet,
    batches: Batches,
    settings: TopKSettings,
    schedule: OptimiserSettings,
    seed: int,
) -> None:
    """Train `slices` for the steps of `schedule`, in place, on what `batches` draws."""
    optimiser = make_optimiser([{"params": list(slices.parameters())}], schedule)
    data, signs = torch.Generator().manual_seed(seed + 1), torch.Generator().manual_seed(seed + 2)
    for step in range(schedule.steps):
        clean = clean_pass(target, batches(data, step), slices.names)
        masks = top_k_masks(target, slices, clean, settings, signs)
        optimiser.zero_grad(set_to_none=True)
        top_k_loss(target, slices, clean, masks, settings).backward()
        set_rate(optimiser, schedule, step)
        optimiser.step()


def top_k_loss(
    target: Target, slices: SliceSet, clean: Clean, masks: Mapping[str, Tensor], settings: TopKSettings
) -> Tensor:
    """The objective on the batch of a clean pass, one number, for `masks[m]` `[B, T, C]` of zeros and ones."""
    piece = whole(target, masks)
    hidden = plan_pass(target, slices, clean, [piece], importance_masks(masks, slices.delta))
    (divergence,) = row_divergences(target, clean, [piece], hidden, reverse=False)
    simplicity = torch.stack([_simplicity(slices, name, mask, settings.p) for name, mask in masks.items()]).sum()
    held = settings.faithfulness * exact_faithfulness(target, slices)
    return divergence.mean() + held + settings.simplicity * simplicity


def whole(target: Target, masks: Mapping[str, Tensor]) -> Piece:
    """All sequences of a variant that replaces every matrix of `masks`."""
    entry = min(target.matrices[name].block for name in masks)
    return Piece(Variant("", "importance", frozenset(masks), entry, 1.0), 0, len(next(iter(masks.values()))))


def _simplicity(slices: SliceSet, name: str, mask: Tensor, p: float) -> Tensor:
    own = slices.of(name)
    norms = own.U.square().sum(0) * own.V.square().sum(1)  # of the rank-1 matrices, squared
    return (mask.mean((0, 1)) * (norms + 1e-12) ** (p / 2)).sum()


@torch.no_grad()
def top_k_masks(
    target: Target, slices: SliceSet, clean: Clean, settings: TopKSettings, signs: torch.Generator
) -> dict[str, Tensor]:
    """Masks `[B, T, C]` by matrix: 1 where an attribution is among the largest of the batch, else 0."""
    scores = attributions(target, slices, clean, settings.probes, signs)
    flat = torch.cat([score.flatten() for score in scores.values()])
    kept = round(settings.active * clean.batch.valid.numel())
    chosen = torch.zeros_like(flat).index_fill_(0, flat.topk(kept).indices, 1.0)
    parts = chosen.split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


@torch.no_grad()
def attributions(
    target: Target, slices: SliceSet, clean: Clean, probes: int, signs: torch.Generator
) -> dict[str, Tensor]:
    """Attributions `[B, T, C]` by matrix, on the batch of a clean pass."""
    inner = {name: clean.inputs[name] @ slices.of(name).U for name in slices.names}
    sums = {name: torch.zeros_like(values) for name, values in inner.items()}
    for gradients in output_gradients(target, clean.batch, slices.names, probes, signs):
        for name, gradient in gradients.items():
            sums[name] += (inner[name] * (gradient @ slices.of(name).V.t())).square()
    return {name: total / probes for name, total in sums.items()}


def output_gradients(
    target: Target, batch: Batch, names: list[str], probes: int, signs: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """By matrix the gradient `[B, T, O]`, by what it writes, of a sum of the target's outputs with random signs; once a
    probe."""
    with torch.enable_grad(), _leaves(target, names) as (leaves, last):
        target.run(batch.tokens)
        hidden = last[0].flatten(0, 1).index_select(0, batch.looked_at.spots)
        outputs = target.outputs(hidden)
        for probe in range(probes):
            drawn = (2 * torch.randint(2, outputs.shape, generator=signs) - 1).to(outputs)
            found = torch.autograd.grad((outputs * drawn).sum(), list(leaves.values()), retain_graph=probe < probes - 1)
            yield dict(zip(leaves, found, strict=True))


@contextmanager
def _leaves(target: Target, names: list[str]) -> Iterator[tuple[dict[str, Tensor], list[Tensor]]]:
    """While open, every matrix's output gets zeros added, kept as leaves of the graph; beside them what the last block
    gave."""
    leaves: dict[str, Tensor] = {}
    last: list[Tensor] = []

    def add(name: str) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            matrix = target.matrices[name]
            own = matrix.covered(output)
            leaves[name] = torch.zeros_like(own).requires_grad_()
            return matrix.with_covered(output, own + leaves[name])

        return hook

    handles = [target.matrices[name].module.register_forward_hook(add(name)) for name in names]
    handles.append(target.blocks[-1].register_forward_hook(lambda module, args, out: last.append(hidden_of(out))))
    try:
        yield leaves, last
    finally:
        for handle in handles:
            handle.remove()
