"""What is measured of every decomposition: unique active slices and reconstruction (Tables 1b and 1c), in batches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spdcli.engine.forward import Clean
from spdcli.engine.masks import Noise
from spdcli.engine.step import exact_faithfulness, exact_relative_faithfulness, reconstruction
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.tables import losses_where
from spdcli.engine.target import Target
from spdcli.engine.variants import Variant, draw_variants
from spdcli.measures.slice_recovery import Recovery
from spdcli.records import ABSENT, Absent

LOSSES = losses_where(lambda loss: loss.of_outputs and loss.reported)
HIDDEN = losses_where(lambda loss: loss.hidden_of is not None and loss.reported)
PLAN_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`spd.eval/1`, as far as it is the same for every target: Table 1, and the active slices of section 6.2.

    Measured on `sequences` sequences of the stream `seed`. A slice is active where its importance is above `threshold`:
    `unique` counts by matrix the slices that are active anywhere (Table 1b), `total_active` is their sum (section 6.2:
    96 of GPT-2 on two prompts), of `total_slices`. `active` counts active slices, by matrix and place. `metrics` are
    losses by name (Table 1c): `faithfulness` is the exact one, a squared error a weight, and `relative_faithfulness`
    the exact share of W's squared norm that slices leave out, a mean over matrices; `hidden_recon` is the squared error
    of what matrices give, over that of the target's own, with all of them masked by importances, a mean over matrices
    and positions; the others are KL(target ‖ variant) in nats, a mean over sequences that has its `standard_error`.
    `recon_layerwise_by_matrix` is the KL in nats with that matrix alone replaced, their mean the loss of that name.
    `recovery`, of a planted target alone, says how well its slices are found.
    """

    seed: int
    threshold: float
    sequences: int
    unique: Mapping[str, int]
    total_active: int
    total_slices: int
    metrics: Mapping[str, float]
    standard_error: Mapping[str, float]
    recon_layerwise_by_matrix: Mapping[str, float]
    active: Mapping[str, Mapping[str, float]]
    recovery: Recovery | Absent = ABSENT


@dataclass
class Mean:
    """A mean over sequences and its standard error, fed in batches."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """One value a sequence."""
        wide = values.double()
        self.count += values.numel()
        self.total += wide.sum().item()
        self.squares += wide.square().sum().item()

    @property
    def value(self) -> float:
        """The mean of all values so far."""
        return self.total / self.count

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN for fewer than two sequences."""
        if self.count < 2:
            return math.nan
        spread = max(0.0, self.squares / self.count - self.value**2)
        return math.sqrt(spread / (self.count - 1))


@dataclass
class Sums:
    """Sums over batches, from which `totals` makes the fields of an evaluation that every target has.

    `noise` draws the masks of the stochastic losses. `reconstruction` has a mean a loss, `by_matrix` one a matrix;
    `active_anywhere[m]` `[C]` says of each slice of m whether it was active in any batch.
    """

    target: Target
    decomposition: Decomposition
    threshold: float
    noise: Noise
    reconstruction: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    by_matrix: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    active_anywhere: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, target: Target, decomposition: Decomposition, threshold: float, seed: int) -> Sums:
        """Nothing yet; `seed` is that of the stochastic masks."""
        return cls(target, decomposition, threshold, Noise(torch.Generator(target.device).manual_seed(seed)))

    def add(self, clean: Clean, g: Mapping[str, Tensor]) -> None:
        """One batch with its importances g `[B, T, C]`."""
        for name, values in g.items():
            somewhere = (values[clean.batch.valid] > self.threshold).any(0)
            self.active_anywhere[name] = somewhere | self.active_anywhere.get(name, torch.zeros_like(somewhere))
        self._reconstruct(clean, g)

    def _reconstruct(self, clean: Clean, g: Mapping[str, Tensor]) -> None:
        """The four reconstruction losses of Table 1c, a mean over looked-at positions for every sequence."""
        target, looked = self.target, clean.batch.looked
        blocks = {name: target.matrices[name].block for name in self.decomposition.names}
        count = len(clean.batch.tokens)
        owner = looked.nonzero()[:, 0]
        per_sequence = {loss: torch.zeros(count, device=target.device) for loss in (*LOSSES, *HIDDEN)}

        def consume(variant: Variant, part: slice, divergence: Tensor) -> None:
            rows = owner[(owner >= part.start) & (owner < part.stop)]
            means = torch.zeros(count, device=target.device).index_add_(0, rows, divergence.float())
            means = (means / looked.sum(1).clamp(min=1))[part]
            per_sequence[variant.loss][part] += variant.weight * means
            if variant.loss == "recon_layerwise":
                self.by_matrix[next(iter(variant.matrices))].add(means)

        shape = (count, clean.batch.tokens.shape[1])
        variants = draw_variants(LOSSES, blocks, 1, "forward", shape, torch.Generator())
        reconstruction(target, self.decomposition, clean, variants, g, self.noise, PLAN_BYTES, consume)
        self._compare_hidden(clean, g, per_sequence, blocks)
        for loss, values in per_sequence.items():
            self.reconstruction[loss].add(values)

    def _compare_hidden(
        self, clean: Clean, g: Mapping[str, Tensor], per_sequence: dict[str, Tensor], blocks: Mapping[str, int]
    ) -> None:
        """The hidden losses, a mean over the replaced matrices and positions of every sequence: variants of their own,
        that need no last block, so that those of Table 1c may end at the last position."""

        def look(variant: Variant, part: slice, errors: Tensor) -> None:
            assert variant.hidden is not None
            per_sequence[variant.hidden][part] += variant.weight * errors

        def consume(variant: Variant, part: slice, divergence: Tensor) -> None:
            raise AssertionError("a hidden loss by itself has no outputs to compare")

        shape = (len(clean.batch.tokens), clean.batch.tokens.shape[1])
        variants = draw_variants(HIDDEN, blocks, 1, "forward", shape, torch.Generator())
        reconstruction(self.target, self.decomposition, clean, variants, g, self.noise, PLAN_BYTES, consume, look=look)

    def totals(self) -> dict[str, Any]:
        """The fields of `Evaluation` but for `seed`, `threshold` and `active`."""
        unique = {name: int(somewhere.sum()) for name, somewhere in self.active_anywhere.items()}
        means = {loss: self.reconstruction[loss] for loss in (*LOSSES, *HIDDEN)}
        exact = {
            "faithfulness": exact_faithfulness(self.target, self.decomposition).item(),
            "relative_faithfulness": exact_relative_faithfulness(self.target, self.decomposition).item(),
        }
        return {
            "sequences": means["recon"].count,
            "unique": unique,
            "total_active": sum(unique.values()),
            "total_slices": sum(somewhere.numel() for somewhere in self.active_anywhere.values()),
            "metrics": exact | {loss: mean.value for loss, mean in means.items()},
            "standard_error": dict.fromkeys(exact, 0.0) | {loss: mean.error for loss, mean in means.items()},
            "recon_layerwise_by_matrix": {name: mean.value for name, mean in self.by_matrix.items()},
        }
