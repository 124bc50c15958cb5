"""What a report adds to a fact's edits, and which of them make a row of its table.

slices      the run's own, suppressed: chosen by a rule that looks at no effect, and chosen by effect
baselines   what needs no decomposition: static duals of the same tokens, all that the matrix does along C⁻¹x, and
            all that a second matrix does: the edited one's like in the layer where causal tracing finds the MLPs
            that restore the fact best
controls    random directions of the norm of the rule's edit, and the matrix's largest singular ones
sought      directions optimised for the effect, in both matrices: no evidence of a place, and kept apart
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spdcli.edits.suppression import Edit, suppressions
from spdcli.location.baselines import direct_edit, optimised_edit
from spdcli.location.fact_context import FactContext
from spdcli.location.fact_edits import DIRECT_RIDGE, FactEdits, fact_edits, inputs_at
from spdcli.targets.broad_text import ridged

SLICES, BASELINE, CONTROL, SOUGHT = "slices", "baseline", "control", "sought"


@dataclass(frozen=True)
class RowEdits:
    """A row of a report's table: what it says, its kind, and the edit that it shows, or several that it sums up."""

    label: str
    kind: str
    edits: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ReportEdits:
    """A fact's edits with those that a report adds: all of them `by_name`, and the `rows` that show them.

    Every slice by rule is an edit alone, too, by its address, and no row of the table.
    """

    fact: FactEdits
    by_name: Mapping[str, Edit]
    rows: Sequence[RowEdits]


def report_edits(context: FactContext, row: int, tokens: Sequence[str], second: str, draws: int) -> ReportEdits:
    """The edits of prompt `row`, whose `tokens` are text, with `second` as second matrix and `draws` random edits."""
    target, name = context.target, context.matrix
    fact = fact_edits(context, row, draws)
    edits = {**fact.edits, **suppressions(target, context.decomposition, list(fact.rule))}
    last = fact.positions[-1:]
    if len(fact.positions) > 1:
        edits["direct last"] = direct_at(context, name, row, last)
    if second != name:
        edits["direct second"] = direct_at(context, second, row, fact.positions)
        edits["optimised second"] = optimised_edit(target, context.prompts, row, second, seed=context.seed)
    singular = "top singular direction" + ("s" if len(fact.rule) > 1 else "")
    rows = [
        RowEdits("slices, by rule", SLICES, ("rule",)),
        RowEdits("slices, by effect", SLICES, ("effect",)),
        RowEdits("static duals", BASELINE, ("static_plain",)),
        RowEdits("static duals, whitened", BASELINE, ("static",)),
        RowEdits("direct C⁻¹x", BASELINE, ("direct",)),
        RowEdits(f"direct C⁻¹x at {tokens[last[0]]!r}", BASELINE, ("direct last",)),
        RowEdits(f"direct C⁻¹x in {second}", BASELINE, ("direct second",)),
        RowEdits("random directions", CONTROL, tuple(one for one in edits if one.startswith("random"))),
        RowEdits(singular, CONTROL, ("singular",)),
        RowEdits(f"optimised in {name}", SOUGHT, ("optimised",)),
        RowEdits(f"optimised in {second}", SOUGHT, ("optimised second",)),
    ]
    return ReportEdits(fact, edits, [one for one in rows if edits.keys() >= set(one.edits)])


def direct_at(context: FactContext, name: str, row: int, positions: Sequence[int]) -> Edit:
    """The direct edit of the matrix `name` at `positions` of prompt `row`."""
    x, _ = inputs_at(context, name, row, positions)
    return direct_edit(context.target, name, x, ridged(context.moments[name], DIRECT_RIDGE))
