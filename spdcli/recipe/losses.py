"""The section [losses]: a coefficient for every row of `engine.tables.LOSSES`, and how masks are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, create_model

from spdcli.engine.loss_choices import DELTA_MASKS, HIDDEN_SCALES, HIDDEN_SITES, PENALTIES, SUBSETS
from spdcli.engine.tables import LOSSES
from spdcli.recipe.choices import DIVERGENCES, USUAL_DELTA_MASKS
from spdcli.recipe.section import Coefficient, Few, OneOf, Positive, Rate, Section, Size

if TYPE_CHECKING:
    Coefficients = Section
else:
    Coefficients = create_model(
        "Coefficients",
        __base__=Section,
        **{
            name: (Coefficient, Field(0.0, description=f"Coefficient of {loss.about} ({loss.equation})."))
            for name, loss in LOSSES.items()
        },
    )


class Losses(Coefficients):
    """The coefficient of every loss, 0 leaving it out, and how their masks are drawn (Eq. 1 to 8)."""

    targeted: Coefficient = Field(
        0.0,
        description="What minimality and the recon losses count on data.stream, times their coefficients; there the "
        "delta stays on. Not in the paper.",
    )
    samples: Few = Field(1, description="S, how often the masks of stochastic losses are drawn a step (Eq. 2).")
    p_start: Rate = Field(0.9, description="The power p of minimality at the first step (Table 4 and Figure 6: 0.9).")
    p_final: Rate = Field(0.1, description="The power p at the last step (Table 4 and Figure 6: 0.1).")
    anneal_p: bool = Field(True, description="Whether p goes linearly from p_start to p_final, or stays p_start.")
    epsilon: Rate = Field(1e-12, description="Added to g before the power p, so that its gradient stays finite.")
    penalty: Annotated[str, OneOf(PENALTIES)] = Field(
        "power", description="What minimality and frequency add up of an importance g."
    )
    penalty_final: Rate = Field(
        1.0,
        description="What minimality and frequency count at the last step, times their coefficients; from 1 it goes "
        "there by one factor a step. Not in the paper.",
    )
    gamma_start: Rate = Field(1.0, description="penalty = 'smooth_l0': gamma at the first step. Not in the paper.")
    gamma_final: Rate = Field(
        0.01, description="penalty = 'smooth_l0': gamma at the last step, to which it goes linearly. Not in the paper."
    )
    frequency_tokens: Positive = Field(
        32768,
        description="frequency: a slice that is active in one of so many positions pays as much there as in "
        "minimality, and log2(1 + m) times as much where it is active m times as often. Not in the paper.",
    )
    hidden_at: Annotated[str, OneOf(HIDDEN_SITES)] = Field(
        "matrix", description="Where the hidden losses compare a variant with the target. Not in the paper."
    )
    hidden_scale: Annotated[str, OneOf(HIDDEN_SCALES)] = Field(
        "position", description="What the squared errors of the hidden losses are divided by. Not in the paper."
    )
    last_token_only: bool = Field(
        False,
        description="Whether KLs are taken where a sequence's last token is predicted, or at every position (Table 4: "
        "yes, Figure 6: no).",
    )
    layerwise_matrices: Size | None = Field(
        None, description="Matrices drawn in every step for the layerwise losses; all if not given. Unbiased, cheaper."
    )
    faithfulness_probes: Size | None = Field(
        None,
        description="Random vectors a matrix by which faithfulness is estimated, in place of U V: unbiased and "
        "cheaper. Evaluation is exact whatever this says.",
    )
    subset: Annotated[str, OneOf(SUBSETS)] = Field(
        "forward", description="How often a partial loss draws its subset of the matrices (Eq. 5 and 6: forward)."
    )
    delta_masks: Annotated[str, OneOf(DELTA_MASKS)] = Field(
        USUAL_DELTA_MASKS, description="slices.delta: how the masks of the delta are drawn."
    )
    kl: Annotated[str, OneOf(DIVERGENCES)] = Field(
        "target_to_variant", description="The order of the two distributions in every KL of outputs."
    )

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficient of every loss, by its name in `engine.tables.LOSSES`."""
        return {name: getattr(self, name) for name in LOSSES}
