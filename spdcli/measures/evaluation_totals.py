"""What is measured of every decomposition: unique active slices and reconstruction (Tables 1b and 1c), in batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spdcli.engine.direct_losses import exact_faithfulness, exact_relative_faithfulness
from spdcli.engine.forward import Clean
from spdcli.engine.masks import Noise
from spdcli.engine.reconstruction import reconstruction
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.tables import losses_where
from spdcli.engine.target import Target
from spdcli.engine.variants import Variant, draw_variants, fixed_variant
from spdcli.measures.evidence import Evidence
from spdcli.measures.mean import Mean
from spdcli.measures.slice_recovery import Recovery
from spdcli.records import ABSENT, Absent

EVALUATION_SCHEMA = "spd.eval/2"  # of /1, `active_at` was called active, and counted prompts from 0
LOSSES = losses_where(lambda loss: loss.of_outputs and loss.reported)
HIDDEN = losses_where(lambda loss: loss.hidden_of is not None and loss.reported)
ALL_OFF = "all_off"  # in place of a loss's name: every slice off
PLAN_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Totals:
    """`spd.eval/2`, as far as it is the same for every target: Table 1, and the active slices of section 6.2.

    Measured on `sequences` sequences of the stream `seed`. A slice is active where its importance is above `threshold`:
    `unique` counts by matrix the slices that are active anywhere (Table 1b), `total_active` is their sum (section 6.2:
    96 of GPT-2 on two prompts), of `total_slices`. `metrics` are
    losses by name (Table 1c): `faithfulness` is the exact one, a squared error a weight, and `relative_faithfulness`
    the exact share of W's squared norm that slices leave out, a mean over matrices; `hidden_recon` is the squared error
    of what matrices give, over that of the target's own, with all of them masked by importances, a mean over matrices
    and positions; the others are KL(target ‖ variant) in nats, of a target that gives vectors squared errors, a mean
    over the positions that count, as in training, with a `standard_error` over sequences. `recon_layerwise_by_matrix`
    is the same with that matrix alone replaced; their mean is the loss of that name. `l0` is the mean number of active
    slices at a position, over all matrices; `delta_share` by matrix the share of the energy of its output x W that no
    slice holds: the sum of ‖x (W - U V)‖² over that of ‖x W‖², over all positions. `all_off` is what the loss recon is
    with every slice off, and the delta with them: a decomposition whose recon is no less is worse than none.
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
    l0: float
    delta_share: Mapping[str, float]
    all_off: float | Absent = ABSENT

    @property
    def worse_than_none(self) -> bool:
        """Whether the target's decomposed matrices could as well give nothing."""
        return not isinstance(self.all_off, Absent) and self.metrics["recon"] >= self.all_off


@dataclass(frozen=True, kw_only=True)
class Evaluation(Totals):
    """`spd.eval/2` of a target that predicts tokens.

    `evidence` is what the reconstruction is worth: the same KLs by how masks were chosen. `recovery`, of a planted
    target alone, says how well its slices are found.
    """

    evidence: Evidence
    recovery: Recovery | Absent = ABSENT


@dataclass
class Sums:
    """Sums over batches, from which `totals` makes the fields of an evaluation that every target has.

    `noise` draws the masks of the stochastic losses. `reconstruction` has a mean a loss, `by_matrix` one a matrix;
    `active_anywhere[m]` `[C]` says of each slice of m whether it was active in any batch. `active_slices` counts them
    at all `positions`; `energy[m]` are the sums of squares of x (W - U V) and of x W.
    """

    target: Target
    decomposition: Decomposition
    threshold: float
    noise: Noise
    reconstruction: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    by_matrix: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    all_off: Mean = field(default_factory=Mean)
    active_anywhere: dict[str, Tensor] = field(default_factory=dict)
    positions: int = 0
    active_slices: int = 0
    energy: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def start(cls, target: Target, decomposition: Decomposition, threshold: float, seed: int) -> Sums:
        """Nothing yet; `seed` is that of the stochastic masks."""
        return cls(target, decomposition, threshold, Noise(torch.Generator(target.device).manual_seed(seed)))

    def add(self, clean: Clean, g: Mapping[str, Tensor]) -> None:
        """One batch with its importances g `[B, T, C]`."""
        for name, values in g.items():
            somewhere = (values[clean.batch.valid] > self.threshold).any(0)
            self.active_anywhere[name] = somewhere | self.active_anywhere.get(name, torch.zeros_like(somewhere))
            self.active_slices += int((values[clean.batch.valid] > self.threshold).sum())
            self._add_energy(name, clean.inputs[name][clean.batch.valid])
        self.positions += int(clean.batch.valid.sum())
        self._reconstruct(clean, g)

    def _add_energy(self, name: str, x: Tensor) -> None:
        """What matrix `name` and its delta write at positions x `[n, I]`."""
        weight, own = self.target.matrices[name].weight, self.decomposition.of(name)
        rest = (x @ (weight - own.U @ own.V)).double().square().sum().item()
        whole = (x @ weight).double().square().sum().item()
        before = self.energy.get(name, (0.0, 0.0))
        self.energy[name] = (before[0] + rest, before[1] + whole)

    def _reconstruct(self, clean: Clean, g: Mapping[str, Tensor]) -> None:
        """The four reconstruction losses of Table 1c, a mean over looked-at positions for every sequence; of all
        sequences together, over all these positions."""
        target, looked = self.target, clean.batch.looked
        positions = looked.sum(1)
        blocks = {name: target.matrices[name].block for name in self.decomposition.names}
        count = len(clean.batch.tokens)
        owner = looked.nonzero()[:, 0]
        per_sequence = {loss: torch.zeros(count, device=target.device) for loss in (*LOSSES, *HIDDEN, ALL_OFF)}

        def consume(variant: Variant, part: slice, divergence: Tensor) -> None:
            rows = owner[(owner >= part.start) & (owner < part.stop)]
            means = torch.zeros(count, device=target.device).index_add_(0, rows, divergence.float())
            means = (means / positions.clamp(min=1))[part]
            per_sequence[variant.loss][part] += variant.weight * means
            if variant.loss == "recon_layerwise":
                self.by_matrix[next(iter(variant.matrices))].add(means, positions[part])

        shape = (count, clean.batch.valid.shape[1])
        variants = draw_variants(LOSSES, blocks, 1, "forward", shape, torch.Generator())
        reconstruction(target, self.decomposition, clean, variants, g, self.noise, PLAN_BYTES, consume)
        nothing = {name: torch.zeros_like(values[0, 0]) for name, values in g.items()}
        off = fixed_variant(ALL_OFF, nothing, blocks, 0.0)
        reconstruction(target, self.decomposition, clean, [off], g, self.noise, PLAN_BYTES, consume)
        self.all_off.add(per_sequence.pop(ALL_OFF), positions)
        self._compare_hidden(clean, g, per_sequence, blocks)
        for loss, values in per_sequence.items():
            self.reconstruction[loss].add(values, positions if loss in LOSSES else None)

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
        """The fields of `Totals` but for `seed`, `threshold` and `evidence`."""
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
            "l0": self.active_slices / self.positions,
            "all_off": self.all_off.value,
            "delta_share": {name: rest / max(whole, 1e-30) for name, (rest, whole) in self.energy.items()},
        }
