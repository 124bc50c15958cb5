"""Where is a fact? The interventions on one fact that a report sets side by side, as edits of the original weights.

    slices      the run's own, suppressed: chosen by a rule that looks at no effect, and chosen by effect
    baselines   what needs no decomposition: static duals of the same tokens, all that the matrix does along C⁻¹x
    controls    random directions of the norm of the rule's edit, and the matrix's largest singular ones
    sought      directions optimised for the effect: they reach nearly everything in nearly every matrix, so that
                they are no evidence of a place, and are kept apart

All are rank 1 or 2 and of one matrix, the last one before the output of the first decomposed MLP, but for those of a
second matrix, its like in the layer where causal tracing finds the MLPs that restore the fact best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spdcli.edits.answer_changes import Questions
from spdcli.edits.selection import Activity, carried, in_order, most_lowering, with_direction
from spdcli.edits.suppression import Address, Edit, find_matrix, suppression, suppressions
from spdcli.engine.forward import clean_pass
from spdcli.engine.subcomponents import Decomposition, distinct_rows
from spdcli.engine.target import Target
from spdcli.errors import UsageError
from spdcli.location.baselines import direct_edit, edit_norm, optimised_edit, random_edit, singular_edit, static_duals
from spdcli.targets.broad_text import ridged

NAMES = 2  # slices by rule, and tokens of a subject where there are none
DIRECT_RIDGE = 0.02  # of C's mean eigenvalue
SLICES, BASELINE, CONTROL, SOUGHT = "slices", "baseline", "control", "sought"


@dataclass(frozen=True)
class Place:
    """One row of a report: the edits that it is the mean of (or the single one), and what they are."""

    name: str
    kind: str
    edits: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Scene:
    """What the facts of one report share: the target, its slices and what they do on the run's prompts, the prompts as
    questions and their tokenizer, the chosen `matrix`, second moments by matrix, the `ridge` that whitens duals, how
    many `random` directions are a control."""

    target: Target
    decomposition: Decomposition
    activity: Activity
    questions: Questions
    tokenizer: Any
    matrix: str
    moments: Mapping[str, Tensor]
    ridge: float
    random: int
    seed: int


def before_output(target: Target, block: int) -> list[str]:
    """The matrices of a block's MLP, in order, without the one that writes for all of it."""
    if not target.parts:
        raise UsageError("a report needs a language model")
    inside = set(target.parts["mlp"][block].modules())
    return [name for name, matrix in target.matrices.items() if matrix.module in inside][:-1]


def chosen_matrix(target: Target, names: Sequence[str], wanted: str | None) -> str:
    """`wanted` if the run decomposes it; else the last matrix before the output of the first MLP that it decomposes."""
    if wanted is not None:
        return find_matrix(names, wanted, "the run decomposes")
    for block in range(len(target.blocks)):
        own = [name for name in before_output(target, block) if name in names]
        if own:
            return own[-1]
    raise UsageError("the run decomposes no MLP matrix that reads the residual stream", "name one with --matrix")


def matrix_like(target: Target, name: str, block: int) -> str:
    """The matrix of another block that stands where `name` does in its own."""
    own = [other for other, matrix in target.matrices.items() if matrix.block == target.matrices[name].block]
    there = [other for other, matrix in target.matrices.items() if matrix.block == block]
    return there[own.index(name)]


def naming_tokens(subject: Sequence[int]) -> list[int]:
    """The last tokens of a subject, at most NAMES, in order; never a prompt's first token, at which every prompt parks
    attention, so that what is there is not the fact's own (unless the subject is nothing else)."""
    later = [position for position in subject if position > 0]
    return later[-NAMES:] or [max(subject)]


def slices_by_rule(scene: Scene, row: int) -> dict[Address, int]:
    """At most NAMES slices of the chosen matrix by a rule that looks at no effect, with their positions.

    They are active at one single token of all the run's prompts, which is this prompt's and not its first; of those,
    the ones of which the original weights hold most, |ûᵀ W v̂|.
    """
    name = scene.matrix
    active = scene.activity.g[name] > 0
    single = (active.flatten(0, 1).sum(0) == 1) & active[row, 1:].any(0)
    found = with_direction(scene.decomposition, {name: single})
    ordered = in_order(found, [carried(scene.target, scene.decomposition, [name])])
    return {one: int(active[row, :, one.index].int().argmax()) for one in ordered[:NAMES]}


def slices_by_effect(scene: Scene, row: int) -> list[Address]:
    """At most two slices of the same MLP that lower the answer most: see `most_lowering`."""
    target, decomposition = scene.target, scene.decomposition
    names = [n for n in before_output(target, target.matrices[scene.matrix].block) if n in decomposition.names]
    return most_lowering(target, decomposition, scene.activity, scene.questions, row, names or [scene.matrix])


def inputs_at(scene: Scene, name: str, row: int, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What a matrix reads at `positions` of a prompt `[k, I]`, and at all places of the run's prompts, those first
    and each once, `[n, I]`."""
    clean = clean_pass(scene.target, scene.questions.batch, [name])
    inputs = clean.inputs[name]
    own = inputs[row, list(positions)]
    return own, distinct_rows(torch.cat([own, inputs[scene.questions.batch.valid]]))


@dataclass(frozen=True, eq=False)
class SideBySide:
    """What is set side by side for one fact: `edits` by name and the `places` that they are the rows of.

    `rule` are the slices chosen by rule with their positions, `effect` those by effect; each of `rule` is an edit
    alone, too. `positions` are the tokens that the baselines are of: those of the rule's slices, in order.
    """

    edits: dict[str, Edit]
    places: list[Place]
    rule: dict[Address, int]
    effect: list[Address]
    positions: list[int]

    def add(self, label: str, kind: str, made: Mapping[str, Edit]) -> None:
        """One row and its edits."""
        self.edits.update(made)
        self.places.append(Place(label, kind, tuple(made)))


def fact_edits(scene: Scene, row: int, subject: Sequence[int], tokens: Sequence[str], second: str) -> SideBySide:
    """All edits that are set side by side for prompt `row`.

    `tokens` are the prompt's, `subject` the positions of its subject, whose `naming_tokens` the baselines are of where
    the rule finds no slice; `second` is the second matrix.
    """
    rule = slices_by_rule(scene, row)
    positions = sorted(set(rule.values())) or naming_tokens(subject)
    side = SideBySide({}, [], rule, slices_by_effect(scene, row), positions)
    add_slices(side, scene)
    add_baselines(side, scene, row, tokens[positions[-1]], second)
    norm = edit_norm(side.edits["rule" if side.rule else "direct"])
    drawn = {
        f"random {n}": random_edit(scene.target, scene.matrix, norm, 1, scene.seed + n) for n in range(scene.random)
    }
    side.add("random directions", CONTROL, drawn)
    side.add("top singular direction", CONTROL, {"singular": singular_edit(scene.target, scene.matrix, 1)})
    for label, matrix in {"optimised": scene.matrix, "optimised second": second}.items():
        if label == "optimised" or second != scene.matrix:
            sought = optimised_edit(scene.target, scene.questions, row, matrix, seed=scene.seed)
            side.add(f"optimised in {matrix}", SOUGHT, {label: sought})
    return side


def add_slices(side: SideBySide, scene: Scene) -> None:
    """The run's slices: by rule, together and each alone, and by effect."""
    rule = list(side.rule)
    if rule:
        side.add("slices, by rule", SLICES, {"rule": suppression(scene.target, scene.decomposition, rule)})
        side.edits.update(suppressions(scene.target, scene.decomposition, rule))
    if side.effect:
        cut = suppression(scene.target, scene.decomposition, side.effect)
        side.add("slices, by effect", SLICES, {"effect": cut})


def add_baselines(side: SideBySide, scene: Scene, row: int, last: str, second: str) -> None:
    """Edits of the same tokens that need no decomposition; `last` is the text of the last of them."""
    target, name = scene.target, scene.matrix
    x, rows = inputs_at(scene, name, row, side.positions)
    index = range(len(side.positions))
    usual = ridged(scene.moments[name], DIRECT_RIDGE)
    whitening = ridged(scene.moments[name], scene.ridge)
    side.add("static duals", BASELINE, {"dual": static_duals(target, name, rows, index)})
    side.add("static duals, whitened", BASELINE, {"dual whitened": static_duals(target, name, rows, index, whitening)})
    side.add("direct C⁻¹x", BASELINE, {"direct": direct_edit(target, name, x, usual)})
    if len(index) > 1:
        side.add(f"direct C⁻¹x at {last!r}", BASELINE, {"direct last": direct_edit(target, name, x[-1:], usual)})
    if second != name:
        x, _ = inputs_at(scene, second, row, side.positions)
        deeper = direct_edit(target, second, x, ridged(scene.moments[second], DIRECT_RIDGE))
        side.add(f"direct C⁻¹x in {second}", BASELINE, {"direct second": deeper})
