"""The section [certify]: what `spd certify` must find in a run. A row of BOUNDS is a key, and a row of its report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field, create_model

from spdcli.engine.tables import Choice
from spdcli.recipe.section import Coefficient, Section


@dataclass(frozen=True)
class Bounded(Choice):
    """A number that `spd certify` measures. The bound is the largest that it may be, or with `least` the smallest.

    `grade`: what kind of evidence it is, a key of `engine.tables.GRADES`; empty where that means nothing.
    """

    grade: str = ""
    least: bool = False

    def holds(self, value: float, bound: float) -> bool:
        """Whether `value` is within `bound`; NaN never is."""
        return value >= bound if self.least else value <= bound

    def words(self, bound: float) -> str:
        """The bound, as in `≤ 0.1`."""
        return f"{'≥' if self.least else '≤'} {bound:g}"


BOUNDS: dict[str, Bounded] = {
    "l0": Bounded("active slices a position, over all matrices"),
    "total_active": Bounded("slices that are active anywhere"),
    "active_random": Bounded("of the toy: active slices a random position, of the matrix that has most"),
    "faithfulness": Bounded("squared difference between W and U V, a mean over all weights"),
    "delta_share": Bounded("share of the energy of x W that is in x (W - U V), of the matrix that has most"),
    "recon_layerwise": Bounded("KL with one matrix masked by importances, a mean over matrices", grade="importance"),
    "kl_importance": Bounded("KL under importance masks, the delta off", grade="importance"),
    "accuracy_importance": Bounded(
        "share of answers told right under importance masks", grade="importance", least=True
    ),
    "kl_stochastic": Bounded("KL under masks drawn anew for every slice and position", grade="stochastic"),
    "kl_corner_0": Bounded("KL under importance masks, the delta's mask 0 everywhere", grade="corner"),
    "kl_corner_half": Bounded("KL under importance masks, the delta's mask ½ everywhere", grade="corner"),
    "kl_corner_1": Bounded("KL under importance masks, the delta's mask 1 everywhere", grade="corner"),
    "kl_all_on_0": Bounded("KL with every slice on, the delta's mask 0: the target with U V for W", grade="corner"),
    "kl_all_on_half": Bounded("KL with every slice on, the delta's mask ½", grade="corner"),
    "accuracy_corners": Bounded("share of answers told right in the worst corner", grade="corner", least=True),
    "pgd_shared": Bounded("KL under the worst masks that all positions share", grade="adversarial"),
    "pgd_shared_accuracy": Bounded("share of answers told right under them", grade="adversarial", least=True),
    "pgd_shared_delta_off": Bounded("KL under the worst shared masks with the delta off", grade="adversarial"),
    "pgd_curve": Bounded("KL under the worst shared masks of the whole curve of steps", grade="adversarial"),
    "pgd_by_position": Bounded("KL under the worst masks of their own at every position", grade="adversarial"),
    "kl_held_out_0": Bounded("text not trained on: KL under importance masks, the delta's mask 0", grade="corner"),
    "kl_held_out_1": Bounded("text not trained on: KL under importance masks, the delta's mask 1", grade="corner"),
    "matched_U": Bounded("other runs: mean largest |cos| of a slice's U with one of theirs, the least run", least=True),
    "matched_V": Bounded("other runs: mean largest |cos| of a slice's V with one of theirs, the least run", least=True),
}

if TYPE_CHECKING:
    Bounds = Section
else:
    Bounds = create_model(
        "Bounds",
        __base__=Section,
        **{
            name: (
                Coefficient | None,
                Field(None, description=f"{'Least' if row.least else 'Most'} that may be measured: {row.about}."),
            )
            for name, row in BOUNDS.items()
        },
    )


class Certify(Bounds):
    """What `spd certify` must find, or its exit code is 1. A bound of what was not measured is not met."""

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by name."""
        return {name: bound for name in BOUNDS if (bound := getattr(self, name)) is not None}
