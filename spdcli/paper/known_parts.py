"""The toys of the first SPD paper whose parts are known: what it reports of each, and what must hold of ours.

"Stochastic Parameter Decomposition", Bushnaq, Braun and Sharkey, 2025: Table 1 for the toy models of superposition, the
text and Figures 8 and 12 for residual MLPs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spdcli.errors import UsageError
from spdcli.paper.verdict import Bound, Claim, Evidence
from spdcli.recipe.reading import LoadedRecipe

COSINE = Bound(0.999, None, stated=True)
L2_RATIO = Bound(0.965, 1.035, stated=True)  # no farther from 1 than the farthest that the paper reports, 1.031 ± .001


@dataclass(frozen=True)
class PublishedParts:
    """What is published of a toy of one shape: the mean L2 ratio where there is one, and live slices by matrix."""

    live: Mapping[str, int]
    l2_ratio: float | None = None


def published(loaded: LoadedRecipe) -> PublishedParts:
    """What the paper reports of the toy that a recipe describes; RecipeError where it reports nothing."""
    target = loaded.recipe.target
    size: tuple[Any, ...]
    if target.kind == "tms":
        size = ("tms", target.features, target.hidden, target.identity)
    elif target.kind == "resid_mlp":
        size = ("resid_mlp", target.features, target.d_mlp, target.layers)
    else:
        raise loaded.error("target.kind", f"[target] kind = '{target.kind}': its parts are not known")
    if size not in PUBLISHED:
        raise loaded.error("target.features", f"[target] the paper has no toy of this size: {size[1:]}")
    return PUBLISHED[size]


def _superposed(features: int, hidden: int, identity: bool, l2_ratio: float) -> PublishedParts:
    """W has a slice a feature. Of its transpose nothing is published; the identity has as many as its rank."""
    return PublishedParts({"W": features} | ({"I": hidden} if identity else {}), l2_ratio)


def _computed(features: int, neurons: int, layers: int) -> PublishedParts:
    """Every W_in has a slice a feature, every W_out as many as its rank."""
    return PublishedParts(
        {
            f"{matrix}{layer}": count
            for layer in range(layers)
            for matrix, count in (("W_in", features), ("W_out", neurons))
        }
    )


PUBLISHED: dict[tuple[Any, ...], PublishedParts] = {
    ("tms", 5, 2, False): _superposed(5, 2, False, 0.993),
    ("tms", 40, 10, False): _superposed(40, 10, False, 1.010),
    ("tms", 5, 2, True): _superposed(5, 2, True, 0.992),
    ("tms", 40, 10, True): _superposed(40, 10, True, 1.031),
    ("resid_mlp", 100, 50, 1): _computed(100, 50, 1),
    ("resid_mlp", 100, 25, 2): _computed(100, 25, 2),
    ("resid_mlp", 102, 17, 3): _computed(102, 17, 3),
}


def claims(loaded: LoadedRecipe) -> list[Claim]:
    """The published numbers of a recipe's toy, each under the recipe's name, with the bounds that ours must hold."""
    told, name = published(loaded), loaded.recipe.name
    if loaded.recipe.slices.matrices != ["*"]:
        raise loaded.error("slices.matrices", "[slices] matrices: the paper takes all of them apart; leave it out")
    rows = []
    for matrix, count in told.live.items():
        if matrix in ("W", *(one for one in told.live if one.startswith("W_in"))):
            cosine = 1.0 if told.l2_ratio is not None else None
            rows.append(Claim(f"{name}: max cosine, {matrix}", _part(matrix, "mean_max_cosine"), cosine, COSINE))
            rows.append(Claim(f"{name}: L2 ratio, {matrix}", _part(matrix, "l2_ratio"), told.l2_ratio, L2_RATIO))
        exactly = Bound(count, count, stated=True)
        rows.append(Claim(f"{name}: live slices, {matrix}", _live(matrix), count, exactly))
    return rows


def _part(matrix: str, measure: str) -> Callable[[Evidence], float]:
    def read(evaluation: Evidence) -> float:
        value = evaluation["parts"][matrix][measure]
        return float("nan") if value is None else value

    return read


def _live(matrix: str) -> Callable[[Evidence], float]:
    return lambda evaluation: evaluation["live"][matrix]


EXPERIMENTS: dict[str, Sequence[str]] = {
    "tms": ("tms-5-2-quick", "tms-5-2-id-quick", "tms-40-10-quick", "tms-40-10-id-quick"),
    "resid-mlp": ("resid-mlp-1-quick", "resid-mlp-2-quick", "resid-mlp-3-quick"),
}


def recipes_of(experiment: str, recipe: str | None) -> Sequence[str]:
    """The recipes of an experiment: all of its own, or the one that is named."""
    if experiment not in EXPERIMENTS:
        raise UsageError(f"no experiment is called {experiment!r}", f"there are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[experiment] if recipe is None else (recipe,)
