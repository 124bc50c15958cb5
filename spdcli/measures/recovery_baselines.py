"""What other methods find of planted slices.

    apd            slices that are trained by attributions, not importances (`engine/top_k.py`)
    svd            all singular slices of each matrix
    greedy_svd     those that greedy pruning keeps at a tolerance (Algorithm 2)
    weighted_svd   the same, of each matrix weighted by what it reads

APD has as many slices as the run, trains as many steps on the same batches, and is told how many slices a position
needs on average. Singular slices are on everywhere: of them nothing is said of positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdcli.engine.forward import Clean
from spdcli.engine.subcomponents import Slices, SliceSet, start_slices
from spdcli.engine.top_k import TopKSettings, fit_top_k, top_k_masks
from spdcli.measures.greedy_svd import greedy, plain_set, weighted_set
from spdcli.measures.rank_curves import CurveData, curve_data, within
from spdcli.measures.slice_recovery import Recovery, compared, recovery_data, recovery_where
from spdcli.runs.loading import LoadedRun
from spdcli.runs.settings import optimiser_settings

TOLERANCE = 1e-3  # nats; of squared errors the share of what is lost without the matrices
SIMPLICITY = 1e-3
COUNTED = 512  # sequences on which the needed slices of a position are counted


def baseline_recoveries(run: LoadedRun, sequences: int) -> dict[str, Recovery]:
    """How well each baseline finds the planted slices of the matrices that the run decomposed."""
    return {"apd": apd_recovery(run, sequences), **svd_recoveries(run, sequences)}


def apd_recovery(run: LoadedRun, sequences: int) -> Recovery:
    """The same matrices taken apart by APD."""
    subject, seed = run.subject, run.recipe.seed
    slices, settings = apd_slices(run, needed_at_a_position(run))
    signs = torch.Generator().manual_seed(seed)

    def active(clean: Clean) -> dict[str, Tensor]:
        masks = top_k_masks(subject.target, slices, clean, settings, signs)
        return {name: mask > 0 for name, mask in masks.items()}

    return recovery_where(subject, slices, active, sequences, seed)


def apd_slices(run: LoadedRun, active: float) -> tuple[SliceSet, TopKSettings]:
    """The slices that APD finds in the run's matrices, `active` of them on at a position of its batches, and how it
    was set."""
    subject, recipe = run.subject, run.recipe
    matrices = {name: subject.target.matrices[name] for name in run.decomposition.names}
    slices = SliceSet(start_slices(matrices, recipe.slices.C, "random", None, recipe.seed), delta=False)
    slices.to(subject.target.device)
    settings = TopKSettings(active, recipe.losses.coefficients["faithfulness"], SIMPLICITY)
    fit_top_k(subject.target, slices, subject.batches, settings, optimiser_settings(recipe.decompose), recipe.seed)
    return slices, settings


def needed_at_a_position(run: LoadedRun) -> float:
    """How many slices of the run's matrices a position needs, a mean over positions."""
    assert run.subject.planted is not None
    batch = run.subject.planted.draw(COUNTED, torch.Generator().manual_seed(run.recipe.seed))
    needed = run.subject.planted.needed(batch)
    return sum(float(needed[name].sum()) for name in run.decomposition.names) / batch.tokens.numel()


@torch.no_grad()
def svd_recoveries(run: LoadedRun, sequences: int) -> dict[str, Recovery]:
    """What singular value decompositions find, on so many sequences."""
    names = run.decomposition.names
    factors = recovery_data(run.subject, names, None, sequences, run.recipe.seed).factors

    def recovery(slices: SliceSet) -> Recovery:
        own = {name: slices.of(name) for name in names}
        return compared(run.subject, own, {name: list(range(one.U.shape[1])) for name, one in own.items()}, factors)

    return {method: recovery(slices) for method, slices in singular_slices(run, sequences).items()}


@torch.no_grad()
def singular_slices(run: LoadedRun, sequences: int) -> dict[str, SliceSet]:
    """The singular slices of the run's matrices that each method keeps, its greedy steps measured on so many sequences
    of evaluation."""
    data = curve_data(run.subject, run.decomposition, sequences, run.recipe.seed)
    plain, weighted = plain_set(data), weighted_set(data)
    return {"svd": plain, "greedy_svd": _kept(data, plain), "weighted_svd": _kept(data, weighted)}


def _kept(data: CurveData, slices: SliceSet) -> SliceSet:
    """The slices that greedy pruning, one at a time, keeps at TOLERANCE: the largest of each matrix."""
    points = greedy(data, slices, 1, lambda done, total: None)
    nats = data.target.output_loss == "kl"
    stop = within(points, TOLERANCE * (1 if nats else points[-1].kl))
    assert stop is not None, "all of them are the target's own matrices"
    kept = {}
    for name, rank in stop.ranks.items():
        own = slices.of(name)
        kept[name] = Slices(own.U[:, : int(rank)], own.V[: int(rank)])
    return SliceSet(kept, delta=False)
