"""Slices chosen by rule: those of a token in a prompt, nowhere else, the strongest first.

A slice is *unique* to prompt i at a token when its importance is above the threshold at that token in prompt i and
nowhere in any other prompt of the run; with `only_at` also nowhere else in prompt i. What is found is put in order by

    importance   the importance at the token; ties, which are many at 1, by what is written
    written      the norm of what the slice writes at the token, |x u| ‖v‖
    weight       |ûᵀ W v̂|, the part of the original weights that its suppression takes away
    effect       how far its suppression alone lowers the answer's log-probability: measured, not a rule set beforehand

The first three look at no effect, so that a choice by them can be stated before an edit is tried. B prompts, T
positions, C slices of a matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.edits.answer_changes import measure_columns
from spdcli.edits.choices import USUAL_TOGETHER
from spdcli.edits.prompts_and_answers import Questions, own_questions, pick
from spdcli.edits.suppression import Address, Edit, suppression, suppressions
from spdcli.engine.subcomponents import Decomposition, SliceSet
from spdcli.engine.target import Target
from spdcli.errors import UsageError
from spdcli.measures.importances import importances_of
from spdcli.measures.matrix_patterns import matrices_like
from spdcli.measures.texts import TOY_SEQUENCES, Texts, own_texts
from spdcli.runs.subject import Subject

SPARED = 0.1  # how far slices chosen by effect may change the run's other prompts
PAIRED = 12  # the strongest slices that are tried in pairs


@dataclass(frozen=True, eq=False)
class Activity:
    """What a run's slices do on some texts: importances `g[m]` and inner activations `inner[m]`, `[B, T, C]` each."""

    texts: Texts
    g: Mapping[str, Tensor]
    inner: Mapping[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """Which slices: at `token` of prompt `row`, its own alone or not, of `matrices`; the first `top` in order."""

    row: int
    token: str
    unique: bool = True
    only_at: bool = False
    matrices: tuple[str, ...] = ("*",)
    top: int | None = None
    by: str = "importance"
    threshold: float = 0.0


def activity_of(subject: Subject, decomposition: Decomposition, texts: Texts) -> Activity:
    """The slices' activity on `texts`."""
    g, inner = importances_of(subject, decomposition, texts.batch)
    return Activity(texts, g, inner)


def own_activity(subject: Subject, decomposition: Decomposition, seed: int) -> tuple[Activity, Questions]:
    """The activity on a run's own prompts (of the toy: a few sequences), and the same prompts as questions."""
    return (
        activity_of(subject, decomposition, own_texts(subject, seed)),
        own_questions(subject, TOY_SEQUENCES, seed),
    )


def find_positions(texts: Texts, row: int, token: str) -> list[int]:
    """Where `token` stands in prompt `row`; UsageError where it does not."""
    positions = [position for prompt, position in texts.find(token) if prompt == row]
    if not positions:
        raise UsageError(f"prompt {row + 1} has no token {token!r}", f"its tokens are {texts.pieces[row]}")
    return positions


def active_at(
    activity: Activity, row: int, positions: Sequence[int], threshold: float, unique: bool, only_at: bool
) -> dict[str, Tensor]:
    """Which slices are active at one of `positions` of prompt `row` (and nowhere else), `[C]` bool a matrix."""
    which = {}
    for name, values in activity.g.items():
        active = values > threshold
        here = active[row, list(positions)].any(0)
        if unique:
            others = active.any(1)
            others[row] = False
            here = here & ~others.any(0)
        if only_at:
            elsewhere = active[row].clone()
            elsewhere[list(positions)] = False
            here = here & ~elsewhere.any(0)
        which[name] = here
    return which


def with_direction(slices: SliceSet, which: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`which`, `[C]` bool a matrix, without slices that are all zeros, which have no direction to suppress."""
    kept = {}
    for name, mask in which.items():
        own = slices.of(name)
        kept[name] = mask & (own.U.norm(dim=0) * own.V.norm(dim=1) > 0)
    return kept


def written_amounts(slices: SliceSet, activity: Activity, row: int, positions: Sequence[int]) -> dict[str, Tensor]:
    """|x u| ‖v‖ `[C]` a matrix, the largest over `positions` of prompt `row`."""
    return {
        name: inner[row, list(positions)].abs().amax(0) * slices.of(name).V.norm(dim=1)
        for name, inner in activity.inner.items()
    }


def weight_carried(target: Target, slices: SliceSet, names: Sequence[str]) -> dict[str, Tensor]:
    """|ûᵀ W v̂| `[C]` a matrix; 0 for a slice without direction."""
    sizes = {}
    for name in names:
        own = slices.of(name)
        norms = own.U.norm(dim=0) * own.V.norm(dim=1)
        products = ((own.U.t() @ target.matrices[name].weight) * own.V).sum(1)
        sizes[name] = torch.where(norms > 0, products.abs() / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)
    return sizes


def in_order(which: Mapping[str, Tensor], scores: Sequence[Mapping[str, Tensor]]) -> list[Address]:
    """The slices of `which`, `[C]` bool a matrix, highest score first.

    `scores` have `[C]` a matrix each; a later one settles the ties of those before it.
    """
    index = {name: mask.nonzero()[:, 0] for name, mask in which.items()}
    addresses = [Address(name, number) for name, numbers in index.items() for number in numbers.tolist()]
    order = torch.arange(len(addresses))
    for score in reversed(scores):
        values = torch.cat([score[name][numbers].double().cpu() for name, numbers in index.items()])
        order = order[values[order].argsort(descending=True, stable=True)]
    return [addresses[place] for place in order.tolist()]


def by_effect(
    target: Target, slices: SliceSet, questions: Questions, addresses: Sequence[Address]
) -> list[tuple[Address, float]]:
    """The slices with log(after / before) of the answer of the one question, the largest fall first."""
    columns = measure_columns(target, questions, suppressions(target, slices, addresses))
    falls = {address: columns[str(address)].ratio.log().item() for address in addresses}
    return sorted(falls.items(), key=lambda entry: entry[1])


def select(
    subject: Subject, decomposition: Decomposition, activity: Activity, questions: Questions, rule: Rule
) -> list[Address]:
    """The slices that `rule` chooses in a run's own `activity`, in its order; `questions` are the same prompts.

    Raises UsageError where no matrix matches, the token is not there, or no slice is there.
    """
    names = matrices_like(list(activity.g), rule.matrices)
    positions = find_positions(activity.texts, rule.row, rule.token)
    active = active_at(activity, rule.row, positions, rule.threshold, rule.unique, rule.only_at)
    which = with_direction(decomposition, {name: active[name] for name in names})
    amounts = written_amounts(decomposition, activity, rule.row, positions)
    if rule.by == "importance":
        importance = {name: values[rule.row, positions].amax(0) for name, values in activity.g.items()}
        ordered = in_order(which, [importance, amounts])
    elif rule.by == "written":
        ordered = in_order(which, [amounts])
    elif rule.by == "weight":
        ordered = in_order(which, [weight_carried(subject.target, decomposition, names)])
    else:
        assert rule.by == "effect", rule.by
        unordered = in_order(which, [amounts])
        question = pick(questions, [rule.row])
        ordered = [address for address, _ in by_effect(subject.target, decomposition, question, unordered)]
    if not ordered:
        kind = "active only there" if rule.unique or rule.only_at else "active"
        raise UsageError(
            f"no slice of these matrices is {kind} at {rule.token!r} in prompt {rule.row + 1}",
            "spd inspect shows what is active there; where nearly all slices are, the run wants more steps",
        )
    return ordered[: rule.top]


def most_lowering(
    target: Target,
    decomposition: Decomposition,
    activity: Activity,
    questions: Questions,
    row: int,
    names: Sequence[str],
    together: str = USUAL_TOGETHER,
    paired: int = PAIRED,
) -> list[Address]:
    """The slice or the pair that lowers the answer of prompt `row` most, of those of the matrices `names` that are
    active in that prompt and at no prompt's first token, suppressed as `together` says.

    What changes another prompt by SPARED or more is passed over; nothing is left where all do. Pairs are of the
    `paired` strongest. First tokens are left out because what they read is the token alone, the same in every text that
    begins with it, and attention sinks into them.
    """
    on = {name: activity.g[name] > 0 for name in names}
    which = {name: where[row].any(0) & ~where[:, 0].any(0) for name, where in on.items()}
    alone = in_order(with_direction(decomposition, which), [weight_carried(target, decomposition, names)])
    sparing: dict[str, tuple[list[Address], float]] = {}

    def measure(candidates: Mapping[str, list[Address]], edits: Mapping[str, Edit]) -> None:
        for name, columns in measure_columns(target, questions, edits).items() if edits else ():
            ratio = columns.ratio
            others = torch.cat([ratio[:row], ratio[row + 1 :]])
            if bool(((others - 1).abs() < SPARED).all()):
                sparing[name] = (candidates[name], ratio[row].item())

    if together == USUAL_TOGETHER:
        each: Mapping[str, Edit] = suppressions(target, decomposition, alone)
    else:
        each = {str(one): suppression(target, decomposition, [one], together) for one in alone}
    measure({str(one): [one] for one in alone}, each)
    strongest = [slices[0] for slices, _ in sorted(sparing.values(), key=lambda entry: entry[1])][:paired]
    pairs = {f"{a} {b}": [a, b] for a, b in itertools.combinations(strongest, 2)}
    measure(pairs, {name: suppression(target, decomposition, pair, together) for name, pair in pairs.items()})
    return min(sparing.values(), key=lambda entry: entry[1])[0] if sparing else []
