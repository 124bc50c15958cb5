"""Which losses a step has, and what of them is annealed: a recipe's [losses], without the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from spdcli.engine.adversary import Attack
from spdcli.engine.loss_choices import PENALTIES
from spdcli.engine.losses import RECONSTRUCTION, annealed_value
from spdcli.engine.tables import LOSSES, losses_where

ASCENDED = losses_where(lambda loss: loss.ascended)
PENALISING = ("minimality", "frequency")


@dataclass(frozen=True)
class LossSettings:
    """Which losses a step has and how their masks are drawn: a recipe's [losses].

    `coefficients` are by name in `tables.LOSSES`; only those above 0 are evaluated. `samples` is S of Eq. 2; `penalty`,
    a key of `loss_choices.PENALTIES`, is what minimality and frequency add up: its power p goes from `p_start` to
    `p_final`, or stays where it is without `anneal_p`, and `epsilon` is added to g before it; its gamma goes from
    `gamma_start` to `gamma_final`; both losses count `penalty_final` times their coefficients at the last step.
    `frequency_tokens` is n of `losses.frequency`; `subset` is a key of `loss_choices.SUBSETS`; `reverse_kl` is
    KL(variant ‖ target). `layerwise_matrices` of the matrices, drawn every step, stand for all in the layerwise losses,
    and `faithfulness_probes` random vectors for the exact faithfulness; None is exact. With `half` the blocks of the
    plan pass multiply in bfloat16; importances and losses stay as they are. `delta_mask` is that of every variant; None
    leaves it to the masks' source, whose masks of the delta are drawn as `delta_masks`, a key of
    `loss_choices.DELTA_MASKS`, says. `attack` finds adversarial masks.
    """

    coefficients: Mapping[str, float]
    samples: int = 1
    p_start: float = 0.9
    p_final: float = 0.1
    anneal_p: bool = True
    epsilon: float = 1e-12
    penalty: str = "power"
    penalty_final: float = 1.0
    gamma_start: float = 1.0
    gamma_final: float = 0.01
    frequency_tokens: float = 32768
    subset: str = "forward"
    reverse_kl: bool = False
    layerwise_matrices: int | None = None
    faithfulness_probes: int | None = None
    half: bool = False
    hidden_at: str = "matrix"
    hidden_scale: str = "position"
    delta_mask: float | None = None
    delta_masks: str = "position"
    attack: Attack = field(default_factory=Attack)

    @property
    def reconstruction(self) -> list[str]:
        """The names of the reconstruction losses that are evaluated."""
        return [name for name in RECONSTRUCTION if self.coefficients.get(name, 0) > 0]

    @property
    def compares_outputs(self) -> bool:
        """Whether a loss needs what the target says, or its attention: without any, later blocks need not be run."""
        attends = self.coefficients.get("attention", 0) > 0
        return attends or any(LOSSES[name].of_outputs for name in self.reconstruction)

    def on_stream(self, share: float) -> LossSettings:
        """The losses of a targeted decomposition on broad text, `share` times those on the prompts.

        The delta stays fully on, so that a variant is the target minus what its masks take away: a slice that is not
        important there must not matter there, and has no way to bring in what the target does not do. Adversaries look
        for their masks on the prompts alone.
        """
        own = (*PENALISING, *(name for name in RECONSTRUCTION if name not in ASCENDED))
        return replace(self, coefficients={n: share * self.coefficients.get(n, 0) for n in own}, delta_mask=1.0)

    def at(self, step: int, steps: int) -> LossSettings:
        """The losses as they count at `step` (from 0): minimality and frequency go to `penalty_final` times their
        coefficients, by one factor a step."""
        share = self.penalty_final ** annealed_value(step, steps, 0, 1)
        falling = {name: share * size for name, size in self.coefficients.items() if name in PENALISING}
        return replace(self, coefficients={**self.coefficients, **falling})

    @property
    def anneals(self) -> str:
        """The name of the penalty's parameter that is annealed: p or gamma."""
        return PENALTIES[self.penalty].parameter

    def annealed(self, step: int, steps: int) -> float:
        """The penalty's p or gamma at `step` (from 0)."""
        if self.anneals == "gamma":
            return annealed_value(step, steps, self.gamma_start, self.gamma_final)
        return annealed_value(step, steps, self.p_start, self.p_final) if self.anneal_p else self.p_start
