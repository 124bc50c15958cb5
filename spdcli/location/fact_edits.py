"""The edits of one fact that are set beside each other: in the table of section 5.2, and in `spd report`.

All are of one matrix (but for the second choice), and of as many directions as the rule has slices:

    rule          slices that are chosen before any effect is seen: see `slices_by_rule`
    effect        of all slices of the matrix's MLP that are active in the prompt, alone and in pairs, the ones that
                  lower its answer most while the run's other prompts change by less than SPARED; facts take no part.
                  What is active at a first token is left out: see `most_lowering`
    static        the dual slices that a dual start begins with, whitened by the second moment of broad text: what
                  training adds to
    static_plain  the same without whitening
    direct        all that the matrix does along C⁻¹x, x its input and C that second moment
    optimised     directions sought for the effect alone. They reach nearly everything in nearly every matrix, so that
                  they are no evidence of a place
    random        random directions with the norm of the edit by rule; with several draws `random 1`, `random 2`, …
    singular      the matrix's largest singular directions

The last six need no decomposition. They are of the tokens at which the rule's slices are most important, or, where the
rule has none, of those that name the subject. I d_in, k such tokens, n places of the run's prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from spdcli.edits.selection import active_at, in_order, most_lowering, weight_carried, with_direction
from spdcli.edits.suppression import Address, Edit, suppression
from spdcli.engine.forward import clean_pass
from spdcli.engine.part_tables import DISTINCT
from spdcli.engine.subcomponents import distinct_rows
from spdcli.location.baselines import direct_edit, edit_norm, optimised_edit, random_edit, singular_edit, static_duals
from spdcli.location.fact_context import FactContext, mlp_matrices
from spdcli.targets.broad_text import ridged

METHODS = ("rule", "effect", "static", "static_plain", "direct", "optimised", "random", "singular")
DIRECT_RIDGE = 0.02  # of C's mean eigenvalue


@dataclass(frozen=True, eq=False)
class FactEdits:
    """The edits of one prompt's fact by the names of METHODS, in that order, without those that chose no slice.

    `rule` has the slices by rule with the positions of the tokens that they were chosen at, `effect` those by effect;
    `positions` are the tokens that the other edits are of, in order.
    """

    rule: Mapping[Address, tuple[int, ...]]
    effect: Sequence[Address]
    positions: Sequence[int]
    edits: Mapping[str, Edit]


def slices_by_rule(context: FactContext, row: int, top: int = 1) -> dict[Address, tuple[int, ...]]:
    """The slices of prompt `row` by a rule that looks at no effect, with the positions of the tokens they are taken at.

    At each token that names the prompt's subject: of the context's matrix the slices that are active there and in no
    other prompt of the run (elsewhere in this prompt they may be); of several the `top` of which the original weights
    hold most, |ûᵀ W v̂|. A slice that is taken at two tokens is there once. Empty where no token has one.

    So a slice is not chosen for being active at one single token of all prompts: that token has to name the subject.
    And one that is active at other tokens of this prompt, too, may be chosen; in the report, each name has its own.
    """
    name, size = context.matrix, weight_carried(context.target, context.decomposition, [context.matrix])
    slices: dict[Address, tuple[int, ...]] = {}
    for token in context.naming[row]:
        active = active_at(context.activity, row, token, 0.0, unique=True, only_at=False)[name]
        for address in in_order(with_direction(context.decomposition, {name: active}), [size])[:top]:
            slices[address] = (*slices.get(address, ()), token[-1])
    return slices


def slices_by_effect(context: FactContext, row: int) -> list[Address]:
    """At most two slices of the context's MLP that lower the answer of prompt `row` most; empty where none may."""
    mlp = mlp_matrices(context.target, context.target.matrices[context.matrix].block)
    names = [name for name in context.activity.g if name in mlp] or [context.matrix]
    return most_lowering(context.target, context.decomposition, context.activity, context.prompts, row, names)


def most_important_at(context: FactContext, row: int, slices: Sequence[Address]) -> list[int]:
    """The positions of prompt `row` at which each of `slices` is most important, each once, in order."""
    return sorted({int(context.activity.g[one.matrix][row, :, one.index].argmax()) for one in slices})


def inputs_at(
    context: FactContext, name: str, row: int, positions: Sequence[int], distinct: float = DISTINCT
) -> tuple[Tensor, Tensor]:
    """What a matrix reads at `positions` of prompt `row` `[k, I]`, and at all places of the run's prompts, each input
    that is `distinct` from others once, `[n, I]`."""
    batch = context.prompts.batch
    inputs = clean_pass(context.target, batch, [name]).inputs[name]
    return inputs[row, list(positions)], distinct_rows(inputs[batch.valid], distinct)


def fact_edits(context: FactContext, row: int, draws: int = 1) -> FactEdits:
    """Every edit of the fact of prompt `row`, with `draws` random ones (see the head of this file)."""
    rule, effect = slices_by_rule(context, row), slices_by_effect(context, row)
    choices = {"rule": list(rule), "effect": effect}
    edits: dict[str, Edit] = {
        how: suppression(context.target, context.decomposition, slices) for how, slices in choices.items() if slices
    }
    naming = [position for token in context.naming[row] for position in token]
    positions = most_important_at(context, row, list(rule)) or naming
    rank = max(1, len(rule))
    edits |= edits_of_tokens(context, row, positions, rank)
    norm = edit_norm(edits["rule" if rule else "direct"])
    for number in range(draws):
        edits[f"random {number}" if number else "random"] = random_edit(
            context.target, context.matrix, norm, rank, context.seed + number
        )
    edits["singular"] = singular_edit(context.target, context.matrix, rank)
    return FactEdits(rule, effect, positions, edits)


def edits_of_tokens(context: FactContext, row: int, positions: Sequence[int], rank: int) -> dict[str, Edit]:
    """The edits at `positions` of prompt `row` that need no decomposition, the optimised one of `rank` directions."""
    target, name, moment = context.target, context.matrix, context.moments[context.matrix]
    x, rows = inputs_at(context, name, row, positions)
    places = [int((rows - one).norm(dim=1).argmin()) for one in x]
    return {
        "static": static_duals(target, name, rows, places, ridged(moment, context.ridge)),
        "static_plain": static_duals(target, name, rows, places),
        "direct": direct_edit(target, name, x, ridged(moment, DIRECT_RIDGE)),
        "optimised": optimised_edit(target, context.prompts, row, name, rank, context.seed),
    }
