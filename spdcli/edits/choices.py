"""What one may choose about an edit and measure of it: tables, each the one place of its names.

The options of commands, the schema of edit scripts and the help are made from these. One line adds a measure. Neither
torch nor transformers is imported.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spdcli.engine.tables import Choice

# How much of each slice's direction a matrix loses: functions from G `[r, r]`, p `[r]` and sizes `[r]` to a `[r]`.
TOGETHER: dict[str, Choice] = {
    "literal": Choice(
        "every projection of the original weights, as the paper writes the sum", "spdcli.edits.suppression:literally"
    ),
    "orthonormal": Choice("the projection on all their directions at once", "spdcli.edits.suppression:jointly"),
    "sequence": Choice("one after the other, in the order given", "spdcli.edits.suppression:in_sequence"),
    "whole": Choice("each slice as it stands in the decomposition, W - U V", "spdcli.edits.suppression:as_they_stand"),
}
USUAL_TOGETHER = "literal"

# The masks of the slices that an ablation leaves.
OTHERS: dict[str, Choice] = {
    "on": Choice("1"),
    "importance": Choice("their importance g"),
    "sampled": Choice("drawn from U(g, 1)"),
}
USUAL_OTHERS = "on"

# What slices that are chosen by rule are ordered by, the largest first.
ORDERS: dict[str, Choice] = {
    "importance": Choice("the importance at the token; ties by what is written"),
    "written": Choice("the norm of what the slice writes at the token"),
    "weight": Choice("the part of the original weights that its suppression takes away"),
    "effect": Choice("how far its suppression lowers the answer's log-probability"),
}


@dataclass(frozen=True, kw_only=True)
class Measure(Choice):
    """A number that is told, and that an edit script may bound: `of` gives it."""

    of: Callable[[Any], Any]


# Of one answer, an `AnswerChange`.
ANSWER_MEASURES: dict[str, Measure] = {
    "probability": Measure(about="P(answer) after the edit", of=lambda answer: answer.after),
    "ratio": Measure(about="P(answer) after / before", of=lambda answer: answer.ratio),
    "change": Measure(about="|after / before - 1|", of=lambda answer: abs(answer.ratio - 1)),
    "kl": Measure(about="KL(before ‖ after) of the next-token distribution, nats", of=lambda answer: answer.kl),
    "rank": Measure(about="the answer's rank after the edit, from 1", of=lambda answer: answer.rank_after),
}

# Of relative changes |after / before - 1| `[…, n]`, a tensor, over the last dimension.
STATISTICS: dict[str, Measure] = {
    "median": Measure(
        about="the middle one, or the mean of the middle two", of=lambda changes: changes.quantile(0.5, dim=-1)
    ),
    "mean": Measure(about="the mean", of=lambda changes: changes.mean(-1)),
    "max": Measure(about="the largest", of=lambda changes: changes.amax(-1)),
}
USUAL_STATISTIC = "mean"


def percentile_99(values: Any) -> Any:
    """What at most one in a hundred of the values `[n]`, a tensor, exceeds: one of them."""
    return values.sort().values[(99 * len(values) - 1) // 100]


# Of the KLs `[n]` of n tokens of a text.
TEXT_MEASURES: dict[str, Measure] = {
    "kl_mean": Measure(about="the mean KL a token of the text, nats", of=lambda kl: kl.mean()),
    "kl_median": Measure(about="the median", of=STATISTICS["median"].of),
    "kl_p99": Measure(about="what one token in a hundred exceeds", of=percentile_99),
    "kl_max": Measure(about="the largest", of=lambda kl: kl.max()),
}

MEASURES: Mapping[str, Measure] = ChainMap(TEXT_MEASURES, STATISTICS, ANSWER_MEASURES)  # those of an answer come first


def in_words(table: Mapping[str, Choice]) -> str:
    """A table for a help text.

    >>> in_words({"on": Choice("1"), "off": Choice("0")})
    'on (1), off (0)'
    """
    return ", ".join(f"{name} ({choice.about})" for name, choice in table.items())
