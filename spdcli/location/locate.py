"""Which slices carry a prompt's answer, and nothing else: every candidate suppressed, measured.

Candidates are the slices that are active somewhere in the prompt. Each is suppressed alone in the original weights,
all in one plan, and ranked by how far the answer's probability falls. What else moves is measured on the run's other
prompts for all of them, and on the facts that the model knows for those that are listed: see `EditMeasurer`. One other
prompt is not lost among a hundred facts, since the two count apart.

Two slices can do more together than the sum of their parts: their excess is

    log r(a, b) - log r(a) - log r(b)        with r = after / before of the answer's probability

and a pair is listed when it is below 0 (the paper's "obe" and " Bryant", section 6.2 and Figure 4).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spdcli.edits.choices import USUAL_STATISTIC
from spdcli.edits.facts_file import Facts
from spdcli.edits.known_facts import known_facts
from spdcli.edits.prompts_and_answers import Questions, about_token, given_questions, pick
from spdcli.edits.selection import (
    Activity,
    activity_of,
    in_order,
    own_activity,
    with_direction,
    written_amounts,
)
from spdcli.edits.suppression import Address, suppression, suppressions
from spdcli.edits.text_changes import TextToKeep
from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import UsageError
from spdcli.location.edit_measurer import AnswerEffect, EditMeasurer, SideEffects
from spdcli.measures.importances import warn_of_span
from spdcli.measures.matrix_patterns import matrices_like
from spdcli.measures.texts import Texts, own_row
from spdcli.progress import Report, silent
from spdcli.runs.subject import Subject


@dataclass(frozen=True)
class Search:
    """What to look for: patterns of matrices, how many slices and pairs to list, how many slices to pair, and by
    which statistic collateral counts and may at most be."""

    matrices: tuple[str, ...] = ("*",)
    top: int = 10
    paired: int = 12
    pairs: int = 5
    statistic: str = USUAL_STATISTIC
    limit: float | None = None
    threshold: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SliceEntry(AnswerEffect, SideEffects):
    """A slice, by its address, and what suppressing it does."""

    slice: str


@dataclass(frozen=True, kw_only=True)
class PairEntry(AnswerEffect, SideEffects):
    """Two slices and what suppressing them together does; `excess` is how much more that is than the sum."""

    slices: list[str]
    excess: float


@dataclass(frozen=True, kw_only=True)
class PromptSearch:
    """What was found for the answer `token` of one prompt (shape of `spd.locate/1`), the best slices and pairs first.

    `before` is P(token); `candidates` counts the slices that were tried and `known_facts` the facts that should stay.
    Of `pairs_measured` pairs `pairs_above_sum` do more than the sum of their parts.
    """

    prompt: str
    token: str
    before: float
    candidates: int
    known_facts: int
    statistic: str
    limit: float | None
    slices: list[SliceEntry]
    pairs_measured: int
    pairs_above_sum: int
    pairs: list[PairEntry]


def locate(
    subject: Subject,
    decomposition: Decomposition,
    prompts: Sequence[int | str] = (),
    token: str | None = None,
    facts: Facts | None = None,
    search: Search | None = None,
    seed: int = 0,
    text: TextToKeep | None = None,
    report: Report = silent,
) -> list[PromptSearch]:
    """The slices that carry the answer `token` of `prompts` (None: their last tokens), one entry a prompt.

    A prompt is one of the run's by its number, from 1, or its text, or another text, whose last token is its answer;
    without any it is each prompt of the run (of the toy: a few sequences, drawn by `seed`). Of `facts` those that
    the model knows should stay as they are, and so should `text`; the toy knows no facts. UsageError where no slice of
    `search.matrices` is active.
    """
    search = search or Search()
    activity, own = own_activity(subject, decomposition, seed)
    rows = {prompt: own_row(own.texts, prompt) for prompt in prompts or range(1, len(own.texts) + 1)}
    foreign = [str(prompt) for prompt, row in rows.items() if row is None]
    known = None if facts is None else known_facts(subject, facts, [*own.texts, *foreign], report)
    if foreign:
        warn_of_span(decomposition, report)
    places = []
    for prompt, row in rows.items():
        question = given_questions(subject, [str(prompt)]) if row is None else pick(own, [row])
        here = activity_on(subject, decomposition, question) if row is None else activity
        places.append((here, row or 0, question))
    searches = []
    for here, number, question in places:
        if token is not None:
            question = about_token(subject, question, token)
        others = [other for other, text in enumerate(own.texts) if text != question.texts[0]]
        rest = pick(own, others) if others else None
        slices = candidates(decomposition, here, number, search)
        known_questions = None if known is None else known.questions
        one = search_prompt(subject, decomposition, slices, question, rest, known_questions, search, text, report)
        searches.append(one)
    return searches


def activity_on(subject: Subject, decomposition: Decomposition, questions: Questions) -> Activity:
    """The slices' activity on questions of the user's own."""
    unsearched = Texts(questions.batch, questions.texts, [], lambda query: [])
    return activity_of(subject, decomposition, unsearched)


def candidates(decomposition: Decomposition, activity: Activity, row: int, search: Search) -> list[Address]:
    """The slices that are active somewhere in text `row` of `activity`, those that write most first."""
    names = matrices_like(list(activity.g), search.matrices)
    active = {name: (activity.g[name][row] > search.threshold).any(0) for name in names}
    positions = range(activity.texts.batch.tokens.shape[1])
    amounts = written_amounts(decomposition, activity, row, positions)
    return in_order(with_direction(decomposition, active), [amounts])


def search_prompt(
    subject: Subject,
    decomposition: Decomposition,
    slices: Sequence[Address],
    question: Questions,
    others: Questions | None,
    facts: Questions | None,
    search: Search,
    text: TextToKeep | None = None,
    report: Report = silent,
) -> PromptSearch:
    """Those of `slices` that lower the answer of the one `question` most.

    `others` are prompts, `facts` known facts, that should stay as they are. With a limit, slices and pairs of more
    collateral are passed over until `top` are there or none is left that lowers the answer; slices that move the other
    prompts too far are not paired. UsageError without a candidate.
    """
    if not slices:
        raise UsageError(f"no slice of these matrices is active in {question.texts[0]!r}")
    measurer = EditMeasurer(subject.target, question, others, facts, search.statistic, search.limit, text, report)
    effects = measurer.effects(suppressions(subject.target, decomposition, slices))
    single = {address: effects[str(address)] for address in slices}
    single = dict(sorted(single.items(), key=lambda entry: entry[1].after))
    by_name = {str(address): effect for address, effect in single.items()}
    beside = measurer.side_effects(by_name, search.top)
    pairs = search_pairs(subject, decomposition, measurer, single, search)
    return PromptSearch(
        prompt=question.texts[0],
        token=question.tokens[0],
        before=next(iter(single.values())).before,
        candidates=len(slices),
        known_facts=len(facts.texts) if facts is not None else 0,
        statistic=search.statistic,
        limit=search.limit,
        slices=[SliceEntry(slice=name, **vars(by_name[name]), **vars(side)) for name, side in beside.items()],
        pairs_measured=pairs.tried,
        pairs_above_sum=pairs.above_sum,
        pairs=pairs.best,
    )


class PairSearch(NamedTuple):
    """How many pairs were measured, how many do more than the sum of their parts, and the best of those."""

    tried: int
    above_sum: int
    best: list[PairEntry]


def search_pairs(
    subject: Subject,
    decomposition: Decomposition,
    measurer: EditMeasurer,
    single: Mapping[Address, AnswerEffect],
    search: Search,
) -> PairSearch:
    """The pairs among the first slices of `single` that move the other prompts within the limit, `search.paired` of
    them; the ones with the least excess first."""
    strongest = [address for address, effect in single.items() if measurer.within(effect.others)][: search.paired]
    pairs = {f"{one} {other}": [one, other] for one, other in itertools.combinations(strongest, 2)}
    edits = {name: suppression(subject.target, decomposition, pair) for name, pair in pairs.items()}
    together = measurer.effects(edits) if edits else {}
    excess = {name: effect.fall - sum(single[part].fall for part in pairs[name]) for name, effect in together.items()}
    above = sorted((name for name in together if excess[name] < 0), key=lambda name: excess[name])
    beside = measurer.side_effects({name: together[name] for name in above}, search.pairs)
    entries = [
        PairEntry(
            slices=[str(part) for part in pairs[name]],
            excess=excess[name],
            **vars(together[name]),
            **vars(side),
        )
        for name, side in beside.items()
    ]
    return PairSearch(len(pairs), len(above), entries)
