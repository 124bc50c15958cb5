"""The losses that can be chosen, a row each, and the grid that they are cells of: mask sources and scopes.

Knows neither torch nor any other module, so that a recipe and the command line's help can be made from it. A new loss
of the grid is one row in LOSSES; whatever else names losses (the recipe's [losses], its rules, evaluation, benchmarks,
the tests) reads them here. Rows that are code say where it is, `module:name`, and it is imported when it is used.
How a loss is computed stands in `loss_choices`, what a decomposition is built of in `part_tables`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Choice:
    """One value that a setting may have: what it means, and its code as `module:name`, where it has a function or a
    class of its own."""

    about: str
    code: str = ""

    def load(self) -> Any:
        """The function or class that `code` names."""
        return _load(self.code)


@cache
def _load(code: str) -> Any:
    return resolve_name(code)


@dataclass(frozen=True)
class Grade(Choice):
    """How much a small KL says where masks come from such a place; `label` is what tables call it."""

    label: str = ""


# From the weakest to the strongest. A decomposition claims that every mask in [g, 1] leaves the target as it is.
GRADES: dict[str, Grade] = {
    "importance": Grade(
        "masks are g itself and the delta is off: one point of the box [g, 1], the one that training looks at",
        label="importance masks (weakest)",
    ),
    "stochastic": Grade(
        "masks drawn at random in [g, 1], anew for every slice and position: what is wrong averages out",
        label="random masks (weak)",
    ),
    "corner": Grade(
        "plain points of the box at every position at once: delta 0, ½ or 1, slices all on", label="corner"
    ),
    "adversarial": Grade(
        "masks in [g, 1] sought by gradient for the largest KL, the same for every sequence and position or not",
        label="adversarial (strongest)",
    ),
}


@dataclass(frozen=True)
class Source(Choice):
    """Where the masks of a loss come from.

    `code` is a function that says how far every mask is moved from the importance g towards 1, as `masks.uniform`
    does; without one masks are g itself and the delta is off. `sampled`: a recipe's `samples` draws it so many times.
    `ascended`: the numbers are found by ascending the loss (`engine.adversary`), not drawn, and variants bring them.
    `grade`: what a KL under such masks is worth as evidence, a key of GRADES.
    """

    sampled: bool = False
    ascended: bool = False
    grade: str = "importance"


SOURCES: dict[str, Source] = {
    "importance": Source("every mask is the importance g itself, and the delta is off"),
    "stochastic": Source(
        "masks from U(g, 1), the delta's from U(0, 1)", "spdcli.engine.masks:uniform", sampled=True, grade="stochastic"
    ),
    "adversarial": Source(
        "the masks between g and 1, and of the delta between 0 and 1, that sign ascent finds worst",
        "spdcli.engine.masks:ascended",
        ascended=True,
        grade="adversarial",
    ),
}

# Which matrices are replaced together: functions from matrices to the selections that one sample of a loss runs.
SCOPES: dict[str, Choice] = {
    "all": Choice("all matrices at once", "spdcli.engine.variants:all_matrices"),
    "each": Choice("every matrix by itself, the others untouched", "spdcli.engine.variants:each_alone"),
    "subset": Choice("a random subset of the matrices", "spdcli.engine.variants:random_subset"),
}


@dataclass(frozen=True)
class Loss:
    """A term of the training objective; its name is that of its coefficient in a recipe.

    `equation` is where the paper has it. A reconstruction loss is one cell of a grid: masks from `source`, a key of
    SOURCES, on the matrices of `scope`, a key of SCOPES; both are None for a loss of another kind. `holds`: it holds
    slices to the target, so that a recipe needs one such. `reported`: `spd eval` measures it. `compared`: it has a
    column in the table of `spd compare`. `attended`: the attention loss compares its variants' attention patterns.
    `hidden_of`: it compares hidden activations and not outputs, in the variants of the loss of that name.
    """

    name: str
    equation: str
    about: str
    source: str | None = None
    scope: str | None = None
    holds: bool = True
    reported: bool = False
    compared: bool = False
    attended: bool = False
    hidden_of: str | None = None

    @property
    def in_grid(self) -> bool:
        """Whether it is a reconstruction loss: it compares variants of the target with it, by the KL of their outputs
        or by hidden activations."""
        return self.scope is not None

    @property
    def sampled(self) -> bool:
        """Whether its masks are drawn."""
        return self.source is not None and SOURCES[self.source].sampled

    @property
    def ascended(self) -> bool:
        """Whether its masks are an adversary's."""
        return self.source is not None and SOURCES[self.source].ascended

    @property
    def of_outputs(self) -> bool:
        """Whether it is a KL of variants' outputs."""
        return self.in_grid and self.hidden_of is None

    @property
    def grade(self) -> Grade | None:
        """What the loss is worth as evidence that slices do what the target does; None for one of another kind."""
        return None if self.source is None else GRADES[SOURCES[self.source].grade]


def _hidden(loss: Loss) -> Loss:
    """The hidden loss beside a KL of outputs: of the same variants, at the matrices or blocks that they change."""
    about = loss.about.replace("KL (nats) to the target", "relative squared error of hidden activations")
    return Loss(
        f"hidden_{loss.name}",
        "not in the paper",
        about,
        loss.source,
        loss.scope,
        reported=loss.name == "recon",
        hidden_of=loss.name,
    )


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(
            "faithfulness",
            "Eq. 1, left",
            "squared difference between each matrix W and the sum of its slices, a mean over all weights",
            reported=True,
            compared=True,
        ),
        Loss(
            "relative_faithfulness",
            "after Eq. 1, left",
            "mean over matrices of the squared norm of W less the sum of its slices, over that of W",
            reported=True,
        ),
        Loss(
            "minimality",
            "Eq. 1, right",
            "sum over matrices and slices of the importance to the power p, or of another penalty of it, a mean over "
            "positions",
            holds=False,
        ),
        Loss(
            "frequency",
            "after Eq. 1, right",
            "sum over matrices and slices of f log2(1 + frequency_tokens f), f a slice's share of minimality: an "
            "activation of a slice costs the more the more often it is active",
            holds=False,
        ),
        Loss(
            "recon",
            "section 4",
            "KL (nats) to the target with all matrices masked by importances",
            "importance",
            "all",
            reported=True,
            compared=True,
            attended=True,
        ),
        Loss(
            "recon_layerwise",
            "Table 1c",
            "KL (nats) to the target with one matrix masked by importances, a mean over matrices",
            "importance",
            "each",
            reported=True,
            compared=True,
        ),
        Loss(
            "recon_partial",
            "Eq. 5 and Eq. 7",
            "KL (nats) to the target with a random subset of the matrices masked by importances",
            "importance",
            "subset",
        ),
        Loss(
            "stochastic_recon",
            "Eq. 2",
            "KL (nats) to the target with all matrices masked by numbers drawn between importance and 1",
            "stochastic",
            "all",
            reported=True,
            compared=True,
            attended=True,
        ),
        Loss(
            "stochastic_recon_layerwise",
            "Eq. 3",
            "KL (nats) to the target with one matrix masked by numbers drawn between importance and 1, a mean over "
            "matrices",
            "stochastic",
            "each",
            reported=True,
        ),
        Loss(
            "stochastic_recon_partial",
            "Eq. 6 and Eq. 8",
            "KL (nats) to the target with a random subset of the matrices masked by numbers drawn between importance "
            "and 1",
            "stochastic",
            "subset",
        ),
        Loss(
            "adversarial_recon",
            "not in the paper",
            "KL (nats) to the target with all matrices masked by the worst numbers that sign ascent finds between "
            "importance and 1",
            "adversarial",
            "all",
        ),
        Loss(
            "adversarial_recon_partial",
            "not in the paper",
            "KL (nats) to the target with a random subset of the matrices masked by the worst numbers that sign ascent "
            "finds between importance and 1",
            "adversarial",
            "subset",
        ),
        Loss(
            "attention",
            "after Table 1c",
            "KL (nats) of attention patterns to the target's, in the variants of recon and stochastic_recon; for the "
            "toy alone; the paper measures it and does not train on it",
            holds=False,
        ),
    )
}


LOSSES |= {
    row.name: row
    for row in [_hidden(loss) for loss in LOSSES.values() if loss.source and not SOURCES[loss.source].ascended]
}


def losses_where(condition: Callable[[Loss], bool]) -> tuple[str, ...]:
    """The names of the losses of which `condition` is True, in the order of LOSSES."""
    return tuple(name for name, loss in LOSSES.items() if condition(loss))
