"""Is a fact in a run's slices? Cutting them, beside what needs no decomposition: the table of section 5.2.

For each of a run's prompts at most two slices of the first MLP are suppressed, chosen in two ways:

    rule     stated before any effect is seen: of MLP 0's up matrix (c_fc in GPT-2) the slice that is active at the last
             token of the prompt's subject and in no other prompt; of several the one of which W holds most, |ûᵀ W v̂|
    effect   of all slices of MLP 0 that are active in the prompt, alone and in pairs, the ones that lower its answer
             most while the run's other prompts change by less than SPARED. Facts take no part in the choice. Slices
             active at a first token are left out: what they read is that token alone, the same in every text that
             begins with it, and attention sinks into it

and beside them edits of the same matrix and rank, at the tokens where the rule's slices are active: see `baselines`.
Each is measured on the run's own prompts and on the facts that the unchanged model knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from spdcli.edits.answer_changes import Questions, measure_edits, present_answers
from spdcli.edits.facts_file import Facts
from spdcli.edits.known_facts import facts_beside, known_mask, summarise
from spdcli.edits.prompts_and_answers import pick
from spdcli.edits.selection import Activity, Rule, find_positions, most_lowering, own_activity, select
from spdcli.edits.suppression import Address, Edit, suppression
from spdcli.engine.forward import clean_pass
from spdcli.engine.subcomponents import Decomposition, distinct_rows
from spdcli.errors import SpdError, UsageError
from spdcli.location.baselines import (
    direct_edit,
    edit_norm,
    optimised_edit,
    random_edit,
    singular_edit,
    static_duals,
)
from spdcli.measures.inspection import matching
from spdcli.records import plain
from spdcli.runs.subject import Subject
from spdcli.targets.broad_text import ridged, second_moments

FIRST_MLP = ("*.0.mlp.*",)
READS = ("*.0.mlp.up_proj", "*.0.mlp.c_fc")  # the matrix of the rule and of all baselines
DIRECT_RIDGE = 0.02
METHODS = ("rule", "effect", "static", "static_plain", "direct", "optimised", "random", "singular")


@dataclass(eq=False)
class Stage:
    """A run and all that its table needs.

    Its activity, its prompts as questions, the facts it knows, the last token of every prompt's subject, and the
    matrix `name` of the rule with the second moment of its inputs on broad text.
    """

    subject: Subject
    decomposition: Decomposition
    activity: Activity
    own: Questions
    facts: Questions
    subjects: Sequence[str]
    name: str
    moment: Tensor
    ridge: float
    seed: int


def open_stage(
    subject: Subject,
    decomposition: Decomposition,
    facts: Facts,
    subjects: Sequence[str],
    ridge: float,
    seed: int,
) -> Stage:
    """The stage of a run of a language model. SpdError where it has no first MLP, no stream, or knows no fact.

    UsageError where a prompt does not have the token that `subjects` names for it.
    """
    names = [name for name in decomposition.names if any(fnmatchcase(name, pattern) for pattern in READS)]
    if not names:
        raise SpdError("the run does not decompose the first MLP", "slices.matrices has to cover layers.0.mlp.up_proj")
    if subject.stream is None or subject.prompts is None:
        raise SpdError("the recipe names no broad text", "--set data.stream=generated")
    activity, own = own_activity(subject, decomposition, seed)
    asked, _ = facts_beside(subject, facts, own.texts, False)
    known: list[int] = []
    if asked is not None:
        now = present_answers(subject.target, asked.questions)
        known = known_mask(now["p"], now["rank"], asked.known).nonzero()[:, 0].tolist()
    if asked is None or not known:
        raise SpdError("the model knows none of the facts", "spd facts check MODEL says what it knows")
    moment = second_moments(subject.target, subject.stream(), names)[names[0]]
    for row, token in enumerate(subjects):
        find_positions(activity.texts, row, token)
    facts_known = pick(asked.questions, known)
    return Stage(subject, decomposition, activity, own, facts_known, subjects, names[0], moment, ridge, seed)


def by_rule(stage: Stage, row: int) -> list[Address]:
    """The slice of prompt `row` by the rule; empty where none is its own."""
    rule = Rule(row, stage.subjects[row], matrices=(stage.name,), top=1, by="weight")
    try:
        return select(stage.subject, stage.decomposition, stage.activity, stage.own, rule)
    except UsageError:
        return []


def by_effect(stage: Stage, row: int) -> list[Address]:
    """The slice or the pair that lowers the answer of prompt `row` most; empty where none may be taken."""
    names = matching(list(stage.activity.g), FIRST_MLP)
    return most_lowering(stage.subject.target, stage.decomposition, stage.activity, stage.own, row, names)


def positions_of(stage: Stage, row: int, slices: Sequence[Address]) -> list[int]:
    """Where each slice is most important in prompt `row`, each position once."""
    found = [int(stage.activity.g[a.matrix][row, :, a.index].argmax()) for a in slices]
    return list(dict.fromkeys(found))


def edits_of(stage: Stage, row: int) -> tuple[dict[str, Edit], dict[str, list[str]]]:
    """The edit of every method for prompt `row`, and the slices of the two choices."""
    target, name = stage.subject.target, stage.name
    chosen = {"rule": by_rule(stage, row), "effect": by_effect(stage, row)}
    edits: dict[str, Edit] = {
        how: suppression(target, stage.decomposition, slices) for how, slices in chosen.items() if slices
    }
    told = {how: [str(address) for address in slices] for how, slices in chosen.items()}
    if not chosen["rule"]:
        return edits, told
    positions = positions_of(stage, row, chosen["rule"])
    batch = stage.own.batch
    inputs = clean_pass(target, batch, [name]).inputs[name]
    rows = distinct_rows(inputs[batch.valid])
    x = inputs[row, positions]
    places = [int((rows - one).norm(dim=1).argmin()) for one in x]
    white = ridged(stage.moment, stage.ridge)
    count = len(chosen["rule"])
    edits |= {
        "static": static_duals(target, name, rows, places, white),
        "static_plain": static_duals(target, name, rows, places),
        "direct": direct_edit(target, name, x, ridged(stage.moment, DIRECT_RIDGE)),
        "optimised": optimised_edit(target, stage.own, row, name, count, stage.seed),
        "random": random_edit(target, name, edit_norm(edits["rule"]), count, stage.seed),
        "singular": singular_edit(target, name, count),
    }
    return edits, told


def fact_table(stage: Stage) -> list[dict[str, Any]]:
    """One entry a prompt: its answer, and for every method what its edit does.

    `edits[method]` has `own`, the relative change of the prompt's answer (-1 is gone), `others`, the largest
    |relative change| of the run's other prompts, the facts' statistics with intervals and the worst fact, the Frobenius
    norm of what is taken, and for the two choices their `slices`. A method without an edit is left out.
    """
    told = []
    for row, text in enumerate(stage.own.texts):
        edits, chosen = edits_of(stage, row)
        own = measure_edits(stage.subject.target, stage.own, edits)
        beside = measure_edits(stage.subject.target, stage.facts, edits)
        entry: dict[str, Any] = {"prompt": text, "token": stage.own.tokens[row], "edits": {}}
        for method in (name for name in METHODS if name in edits):
            changes = [effect.ratio - 1 for effect in own[method]]
            entry["before"] = own[method][row].before
            facts = torch.tensor([abs(effect.ratio - 1) for effect in beside[method]], dtype=torch.float64)
            worst = max(beside[method], key=lambda effect: abs(effect.ratio - 1))
            entry["edits"][method] = {
                "slices": chosen.get(method),
                "own": changes[row],
                "others": max((abs(change) for i, change in enumerate(changes) if i != row), default=0.0),
                "norm": edit_norm(edits[method]),
                "worst": {"prompt": worst.prompt, "ratio": worst.ratio},
                "known": len(facts),
                **plain(summarise(facts, stage.seed)),
            }
        told.append(entry)
    return told
