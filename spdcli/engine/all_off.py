"""What a decomposition has to beat: its losses with every slice off, and the delta with them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spdcli.engine.forward import Clean
from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.masks import Noise
from spdcli.engine.reconstruction import reconstruction
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.tables import LOSSES
from spdcli.engine.target import Target
from spdcli.engine.variants import Variant, draw_variants

SUBSETS_DRAWN = 8  # of matrices, for a loss that replaces random ones: its mean over them is an estimate


@torch.no_grad()
def losses_all_off(
    target: Target, slices: SliceSet, clean: Clean, settings: LossSettings, budget: float
) -> dict[str, float]:
    """The losses of `settings` on the batch of `clean` with no slice on, so that a replaced matrix gives nothing: those
    of outputs, and faithfulness, by name.

    `budget` is the bytes that one chunk of variants may take, as in `step.backward_step`. Draws from no generator but
    its own.
    """
    wanted = [name for name, coefficient in settings.coefficients.items() if coefficient > 0]
    outputs = [name for name in wanted if LOSSES[name].of_outputs]
    weights = [target.matrices[name].weight for name in slices.names]
    off = {
        "faithfulness": sum(w.double().square().sum().item() for w in weights) / sum(w.numel() for w in weights),
        "relative_faithfulness": 1.0,
    }
    off = {name: value for name, value in off.items() if name in wanted}
    if not outputs:
        return off
    sums = dict.fromkeys(outputs, 0.0)
    generator = torch.Generator().manual_seed(0)
    shape = (len(clean.batch.tokens), clean.batch.valid.shape[1])
    blocks = {name: target.matrices[name].block for name in slices.names}
    repeats = {name: SUBSETS_DRAWN if LOSSES[name].scope == "subset" else 1 for name in outputs}
    variants = [
        replace(variant, source="importance", delta=0.0, weight=variant.weight / repeats[name])
        for name in outputs
        for _ in range(repeats[name])
        for variant in draw_variants([name], blocks, 1, settings.subset, shape, generator)
    ]

    def consume(variant: Variant, part: slice, divergence: Tensor) -> None:
        sums[variant.loss] += variant.weight * divergence.double().sum().item() / clean.outputs.shape[0]

    g = {name: slices.of(name).U.new_zeros(*shape, slices.of(name).U.shape[1]) for name in slices.names}
    variants.sort(key=lambda variant: variant.entry)
    reconstruction(target, slices, clean, variants, g, Noise(generator), budget, consume, settings.reverse_kl)
    return off | sums
