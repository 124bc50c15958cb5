"""The two models that a decomposition is judged by: the target, and the model of its active slices alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, masked_logits
from spdcli.engine.masks import importance_masks
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Target
from spdcli.targets.masking import importance_masks_of, masked_module

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class TargetAndMasked(Generic[Measured]):
    """The same of both models: of the `target`, and `masked`, with every decomposed matrix its active slices alone."""

    target: Measured
    masked: Measured


def patterns_of(
    target: Target, decomposition: Decomposition, clean: Clean, g: Mapping[str, Tensor]
) -> TargetAndMasked[list[Tensor]]:
    """Attention log-probabilities `[B, H, T, T]` of every layer: of the target, and with importances g as masks."""
    assert target.record_patterns is not None, "this target does not tell its attention patterns"
    with target.record_patterns() as patterns:
        target.run(clean.batch.tokens)
        original = patterns.copy()
        patterns.clear()
        masked_logits(target, decomposition, clean, importance_masks(g, decomposition.delta))
        masked = patterns.copy()
    # Blocks before the first decomposed one are not run again: their attention is the target's.
    return TargetAndMasked(original, original[: len(original) - len(masked)] + masked)


@torch.no_grad()
def language_patterns(
    target: Target, decomposition: Decomposition, tokens: Tensor
) -> TargetAndMasked[list[Tensor]] | None:
    """The same of a transformers model on `tokens` `[B, T]`; None where it does not give its attention."""
    model: Any = target.model
    if not hasattr(model, "set_attn_implementation"):
        return None
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that gives weights
    try:
        ask = lambda: model(tokens, output_attentions=True, use_cache=False).attentions  # noqa: E731
        original = ask()
        with masked_module(target, decomposition, importance_masks_of(target, decomposition), 0.0):
            masked = ask()
    finally:
        model.set_attn_implementation(usual)
    if not original or any(one is None for one in (*original, *masked)):
        return None
    return TargetAndMasked([one.log() for one in original], [one.log() for one in masked])
