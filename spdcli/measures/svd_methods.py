"""The methods that `spd svd` compares (Figure 2): the one place of their names and words, read without torch.

`svd.CURVES` has a function of the same name for each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """`legend` names a method in tables and figures, with what rank is to it; `description` is for the help."""

    legend: str
    description: str


METHODS = {
    "greedy_svd": Method(
        "greedy SVD: total rank", "removes, round by round, the singular value that matters least (Algorithm 2)"
    ),
    "weighted_svd": Method(
        "activation-weighted SVD: total rank", "does so with singular values weighted by what the matrices read"
    ),
    "spd": Method("SPD: slices kept everywhere", "removes the run's slices, the least important first"),
    "spd_masked": Method(
        "SPD: slices kept, masked by importance", "removes them likewise, and masks those kept by their importance"
    ),
    "spd_per_position": Method(
        "SPD: mean active slices a position", "removes them where their importance is below a threshold"
    ),
}
