"""What other methods find of the parts of a toy of sparse features; the methods are those of `recovery_baselines.py`.

APD has as many slices on as the run has, on its batches and on a feature alone. Singular slices are on everywhere, so
that no feature has one of its own. F features, C slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from spdcli.engine.forward import clean_pass
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.top_k import top_k_masks
from spdcli.measures.feature_evaluation import PartsFound, parts_found
from spdcli.measures.recovery_baselines import apd_slices, singular_slices
from spdcli.runs.loading import LoadedRun
from spdcli.targets.sparse_features import single_features


def baseline_parts(
    run: LoadedRun, active: Mapping[str, Mapping[str, float]], inputs: int
) -> dict[str, dict[str, PartsFound]]:
    """By method and matrix how well each baseline finds the parts; `active` is that of the run's evaluation.

    Greedy pruning is measured on so many `inputs`.
    """
    slices, on = apd_on_single_features(run, active)
    found = {"apd": _parts(run, slices, on)}
    for method, singular in singular_slices(run, inputs).items():
        everywhere = {name: _everywhere(run, singular, name) for name in singular.names}
        found[method] = _parts(run, singular, everywhere)
    return found


def apd_on_single_features(
    run: LoadedRun, active: Mapping[str, Mapping[str, float]]
) -> tuple[SliceSet, dict[str, Tensor]]:
    """APD's slices, and by matrix which of them are on, 1 or 0, on every feature alone, `[F, C]`."""
    subject = run.subject
    assert subject.feature_toy is not None
    slices, settings = apd_slices(run, sum(one["data"] for one in active.values()))
    settings = replace(settings, active=sum(one["single"] for one in active.values()))
    batch = single_features(subject.feature_toy.features).to(subject.target.device)
    clean = clean_pass(subject.target, batch, slices.names)
    signs = torch.Generator().manual_seed(run.recipe.seed)
    masks = top_k_masks(subject.target, slices, clean, settings, signs)
    return slices, {name: mask[:, 0] for name, mask in masks.items()}


def _everywhere(run: LoadedRun, slices: SliceSet, name: str) -> Tensor:
    assert run.subject.feature_toy is not None
    return torch.ones(run.subject.feature_toy.features, slices.of(name).U.shape[1])


def _parts(run: LoadedRun, slices: SliceSet, on: Mapping[str, Tensor]) -> dict[str, PartsFound]:
    """The matrices that read features, with their parts."""
    toy, matrices = run.subject.feature_toy, run.subject.target.matrices
    assert toy is not None
    reads = {name: read for name, read in toy.reads().items() if name in on}
    return {
        name: parts_found(read @ matrices[name].weight, read, slices.of(name), on[name]) for name, read in reads.items()
    }
