"""The two models that a decomposition is judged by: the target, and the model of its active slices alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from spdcli.engine.forward import Clean, masked_logits
from spdcli.engine.masks import importance_masks
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Target
from spdcli.targets.induction import InductionToy, recorded_patterns

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class TargetAndMasked(Generic[Measured]):
    """The same of both models: of the `target`, and `masked`, with every decomposed matrix its active slices alone."""

    target: Measured
    masked: Measured


def attention_patterns(
    toy: InductionToy, target: Target, decomposition: Decomposition, clean: Clean, g: Mapping[str, Tensor]
) -> TargetAndMasked[list[Tensor]]:
    """Attention log-probabilities `[B, H, T, T]` of every layer: of the target, and with importances g as masks."""
    with recorded_patterns(toy) as patterns:
        target.run(clean.batch.tokens)
        original = patterns.copy()
        patterns.clear()
        masked_logits(target, decomposition, clean, importance_masks(g, decomposition.delta))
        masked = patterns.copy()
    # Blocks before the first decomposed one are not run again: their attention is the target's.
    return TargetAndMasked(original, original[: len(original) - len(masked)] + masked)
