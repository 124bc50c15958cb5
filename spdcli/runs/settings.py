"""From the sections of a recipe to the engine's settings, which know no recipe."""

from __future__ import annotations

import torch

from spdcli.engine.adversary import Attack
from spdcli.engine.fit import FitSettings
from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.optimise import OptimiserSettings, warmup_steps
from spdcli.recipe.schema import Recipe
from spdcli.recipe.training import Adversary, Optimisation

AUTO_PLAN = 4 * 2**30  # bytes that a plan whose budget is found takes at most: larger chunks are no faster

SEQUENCES_AT_ONCE = 512  # of a toy, that are evaluated together


def allow_tensor_cores(precision: str) -> None:
    """Let float32 products on a GPU round their factors to TF32, unless `precision` is float32."""
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")


def optimiser_settings(section: Optimisation) -> OptimiserSettings:
    return OptimiserSettings(
        optimizer=section.optimizer,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        schedule=section.schedule,
        warmup=warmup_steps(section.warmup, section.steps),
        steps=section.steps,
    )


def loss_settings(recipe: Recipe) -> LossSettings:
    section = recipe.losses
    return LossSettings(
        coefficients=section.coefficients,
        samples=section.samples,
        p_start=section.p_start,
        p_final=section.p_final,
        anneal_p=section.anneal_p,
        epsilon=section.epsilon,
        penalty=section.penalty,
        penalty_final=section.penalty_final,
        gamma_start=section.gamma_start,
        gamma_final=section.gamma_final,
        frequency_tokens=section.frequency_tokens,
        subset=section.subset,
        hidden_at=section.hidden_at,
        hidden_scale=section.hidden_scale,
        reverse_kl=section.kl == "variant_to_target",
        layerwise_matrices=section.layerwise_matrices,
        faithfulness_probes=section.faithfulness_probes,
        half=recipe.decompose.precision == "bf16",
        delta_masks=section.delta_masks,
        attack=_attack(recipe.adversary or Adversary.model_validate({})),
    )


def _attack(section: Adversary) -> Attack:
    return Attack(
        persistent=section.masks == "persistent",
        steps=section.steps,
        size=section.size,
        shared=section.shared,
        delta=section.delta,
    )


def fit_settings(recipe: Recipe, free: int = 8 * 2**30) -> FitSettings:
    """A recipe's [decompose] and [losses]; `free` bytes of memory are left for a plan whose budget is found (auto)."""
    section = recipe.decompose
    budget = min(AUTO_PLAN, free / 2) if section.plan_memory == "auto" else section.plan_memory * 2**30
    return FitSettings(
        steps=section.steps,
        clip_slices=section.clip_slices,
        clip_gates=section.clip_gates,
        log_every=section.log_every,
        prune_step=None if section.prune_at is None else round(section.prune_at * section.steps),
        prune_below=section.prune_below,
        plan_bytes=budget,
        losses=loss_settings(recipe),
        targeted=recipe.losses.targeted,
    )
