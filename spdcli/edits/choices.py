"""What one may choose about an edit and measure of it: tables, each the one place of its names.

The options of commands, the schema of edit scripts and the help are made from these. One line adds a measure. Neither
torch nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic_core import CoreSchema, PydanticCustomError, core_schema

if TYPE_CHECKING:
    from torch import Tensor

    from spdcli.edits.answer_changes import AnswerChange

# How several slices of one matrix are suppressed together; `suppression.COEFFICIENTS` has the mathematics.
TOGETHER = {
    "literal": "every projection of the original weights, as the paper writes the sum",
    "orthonormal": "the projection on all their directions at once",
    "sequence": "one after the other, in the order given",
}
USUAL_TOGETHER = "literal"

# The masks of the slices that an ablation leaves.
OTHERS = {"on": "1", "importance": "their importance g", "sampled": "drawn from U(g, 1)"}
USUAL_OTHERS = "on"

# What slices that are chosen by rule are ordered by, the largest first.
ORDERS = {
    "importance": "the importance at the token; ties by what is written",
    "written": "the norm of what the slice writes at the token",
    "weight": "the part of the original weights that its suppression takes away",
    "effect": "how far its suppression lowers the answer's log-probability",
}

# What an edit script may bound of a prompt's answer.
ANSWER_MEASURES: dict[str, Callable[[AnswerChange], float]] = {
    "probability": lambda answer: answer.after,
    "ratio": lambda answer: answer.ratio,
    "change": lambda answer: abs(answer.ratio - 1),
    "kl": lambda answer: answer.kl,
    "rank": lambda answer: answer.rank_after,
}

# What is told of relative changes |after / before - 1| `[…, n]` of the known facts, over the last dimension, and what
# an edit script may bound of them. The median is the mean of the two middle ones.
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "median": lambda changes: changes.quantile(0.5, dim=-1),
    "mean": lambda changes: changes.mean(-1),
    "max": lambda changes: changes.amax(-1),
}
USUAL_STATISTIC = "mean"


def in_words(table: Mapping[str, str]) -> str:
    """A table for a help text.

    >>> in_words({"on": "1", "off": "0"})
    'on (1), off (0)'
    """
    return ", ".join(f"{name} ({words})" for name, words in table.items())


class OneOf:
    """For a pydantic field of text: one of the names that `names()` gives when it is checked."""

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self.names = names

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, core_schema.str_schema())

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.names())}

    def _checked(self, name: str) -> str:
        if name not in self.names():
            raise PydanticCustomError("enum", "expected one of {expected}", {"expected": ", ".join(self.names())})
        return name
