"""The edits of one of several facts that are decomposed together, and what each moves.

    rule         which looks at no effect: of the first MLP's up matrix (c_fc in GPT-2) every slice that is active at a
                 token that names the fact's subject and in no other prompt, taken out as it stands (`whole`), but only
                 to STRENGTH: little of the answer is left then, and what else it moves falls in proportion
    all of it    the same slices, whole
    projection   the same slices, each by its projection, as the paper suppresses
    effect       of all slices of that matrix that are active in the prompt, alone and in pairs, those that lower its
                 answer most and spare the other prompts, whole
    static       the dual slices of the same tokens before any training, whole
    direct       all that the matrix does along C⁻¹x, x its inputs there and C their second moment on broad text
    random       random directions of the norm of the edit by rule

A fact is cut where its answer falls by FALL; an edit spares the others where the bounds of SPARING hold, those of the
pairs in `fact_claims.py`, and their tail where the 99th percentile of known facts is below TAIL, too. Facts whose
question has the subject in it are about the same, whatever they ask: they are told apart from the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.edits.answer_changes import measure_columns
from spdcli.edits.choices import percentile_99
from spdcli.edits.collateral import relative_change, statistics
from spdcli.edits.prompts_and_answers import Questions
from spdcli.edits.selection import active_at, in_order, most_lowering, weight_carried, with_direction
from spdcli.edits.suppression import Address, Edit, suppression
from spdcli.edits.text_changes import TextChange
from spdcli.location.baselines import direct_edit, edit_norm, random_edit, static_duals
from spdcli.location.fact_context import FactContext
from spdcli.location.fact_edits import DIRECT_RIDGE, inputs_at
from spdcli.paper.fact_claims import MEAN, MEDIAN, OTHERS
from spdcli.targets.broad_text import ridged

METHODS = ("rule", "all of it", "projection", "effect", "static", "direct", "random")
WHOLE, STRENGTH = "whole", 0.8
FALL = 0.6  # of an answer's probability: the fact is cut
SPARING = {"others": OTHERS, "median": MEDIAN, "mean": MEAN}  # relative changes
TAIL = 0.1
PAIRED = 4  # the slices by effect that are tried in pairs


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far an edit moves answers that it should leave alone: relative changes |after / before - 1| of `asked`.

    Each is None where nothing was asked.
    """

    asked: int
    median: float | None
    mean: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, ratios: Tensor) -> Reach:
        """Of ratios after / before `[n]`."""
        changes = relative_change(ratios.double())
        if not len(changes):
            return cls(asked=0, median=None, mean=None, p99=None, max=None)
        sizes = {name: value.item() for name, value in statistics(changes).items()}
        return cls(asked=len(changes), p99=percentile_99(changes).item(), **sizes)


@dataclass(frozen=True, kw_only=True)
class DrawnEdit:
    """What one method's edit does: `own`, the relative change of the fact's answer (-1 is gone), and its reach over the
    `others`: the run's other prompts, and the `known` facts that it does not have; `akin` are facts about the same
    subject, of either. `cut`, `spares` and `spares_tail` say whether the bounds hold. `text` is what becomes of
    ordinary text, of the edit by rule alone; None of the others.
    """

    slices: list[str] | None
    own: float
    others: Reach
    known: Reach
    akin: Reach
    norm: float
    cut: bool
    spares: bool
    spares_tail: bool
    text: TextChange | None


def drawn_edits(context: FactContext, row: int, distinct: float) -> tuple[dict[str, Edit], dict[str, list[Address]]]:
    """Every edit of the fact of prompt `row` by the names of METHODS, and the slices of those that choose any.

    Inputs that are not `distinct` have one slice together (`slices.distinct`).
    """
    target, decomposition, name = context.target, context.decomposition, context.matrix
    rule = slices_by_rule(context, row)
    effect = most_lowering(target, decomposition, context.activity, context.prompts, row, [name], WHOLE, PAIRED)
    edits: dict[str, Edit] = {}
    if rule:
        edits["rule"] = suppression(target, decomposition, rule, WHOLE, STRENGTH)
        edits["all of it"] = suppression(target, decomposition, rule, WHOLE)
        edits["projection"] = suppression(target, decomposition, rule)
    if effect:
        edits["effect"] = suppression(target, decomposition, effect, WHOLE)
    positions = [position for token in context.naming[row] for position in token]
    x, rows = inputs_at(context, name, row, positions, distinct)
    places = sorted({int((rows - one).norm(dim=1).argmin()) for one in x})
    moment = context.moments[name]
    edits["static"] = static_duals(target, name, rows, places, ridged(moment, context.ridge), WHOLE)
    edits["direct"] = direct_edit(target, name, x, ridged(moment, DIRECT_RIDGE))
    norm = edit_norm(edits["rule" if rule else "static"])
    edits["random"] = random_edit(target, name, norm, max(1, len(rule)), context.seed)
    return edits, {"rule": rule, "all of it": rule, "projection": rule, "effect": effect}


def slices_by_rule(context: FactContext, row: int) -> list[Address]:
    """Every slice of the context's matrix that is active at a token that names the subject and in no other prompt; what
    the original weights hold most of comes first."""
    name = context.matrix
    positions = [position for token in context.naming[row] for position in token]
    active = active_at(context.activity, row, positions, 0.0, unique=True, only_at=False)[name]
    size = weight_carried(context.target, context.decomposition, [name])
    return in_order(with_direction(context.decomposition, {name: active}), [size])


def about(subject: str, questions: Questions) -> Tensor:
    """Which of the questions have the words `subject` before their answers, `[n]` bool."""
    words = re.compile(rf"\b{re.escape(subject)}\b")
    asked = [text.removesuffix(answer) for text, answer in zip(questions.texts, questions.tokens, strict=True)]
    return torch.tensor([bool(words.search(text)) for text in asked])


def measured_edits(
    context: FactContext,
    row: int,
    subject: str,
    edits: Mapping[str, Edit],
    slices: Mapping[str, Sequence[Address]],
) -> tuple[float, dict[str, DrawnEdit]]:
    """The probability of the answer of prompt `row` before, and what each of the edits of `subject` does."""
    assert context.known is not None
    prompts, known = context.prompts, context.known.questions
    same, akin = about(subject, prompts), about(subject, known)
    on_prompts, on_known = (measure_columns(context.target, questions, edits) for questions in (prompts, known))
    own = torch.arange(len(prompts.texts)) == row
    before = next(iter(on_prompts.values())).before[row].item()
    rows = {}
    for method, edit in edits.items():
        ratios, elsewhere = on_prompts[method].ratio.cpu(), on_known[method].ratio.cpu()
        others, apart = Reach.of(ratios[~own & ~same]), Reach.of(elsewhere[~akin])
        change = ratios[row].item() - 1
        chosen = slices.get(method)
        rows[method] = DrawnEdit(
            slices=None if chosen is None else [str(one) for one in chosen],
            own=change,
            others=others,
            known=apart,
            akin=Reach.of(torch.cat([ratios[~own & same], elsewhere[akin]])),
            norm=edit_norm(edit),
            cut=change <= -FALL,
            spares=spares(others, apart),
            spares_tail=spares(others, apart) and (apart.p99 is None or apart.p99 < TAIL),
            text=None,
        )
    return before, rows


def spares(others: Reach, known: Reach) -> bool:
    """Whether every bound of SPARING holds; what was not asked breaks none."""
    numbers = {"others": others.max, "median": known.median, "mean": known.mean}
    return all(value is None or value < SPARING[name] for name, value in numbers.items())
