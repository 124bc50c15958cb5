"""Is a fact in a run's slices? Cutting them, beside what needs no decomposition: the table of section 5.2.

For each of a run's prompts at most two slices of the first MLP are suppressed: by rule, which is stated before any
effect is seen, of its up matrix (c_fc in GPT-2) the slice of the last token of the prompt's subject, and by effect;
and beside them edits of the same matrix and rank. `location/fact_edits.py` has the rule and all edits. Each is measured
on the run's own prompts (Figure 3) and on the facts that the unchanged model knows (Figure 10).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from spdcli.edits.answer_changes import AnswerChanges, measure_edits
from spdcli.edits.collateral import ChangeSizes, relative_change, summarise
from spdcli.edits.facts_file import Facts
from spdcli.edits.known_facts import known_facts
from spdcli.edits.selection import find_positions
from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import SpdError
from spdcli.location.baselines import edit_norm
from spdcli.location.fact_context import FactContext, fact_context
from spdcli.location.fact_edits import METHODS, FactEdits, fact_edits
from spdcli.measures.texts import own_texts
from spdcli.records import ABSENT, Absent
from spdcli.runs.subject import Subject

READS = ("*.0.mlp.up_proj", "*.0.mlp.c_fc")  # the matrix of the rule and of all baselines


@dataclass(frozen=True)
class WorstFact:
    """The known fact that an edit moves most, and after / before of its answer's probability."""

    prompt: str
    ratio: float


@dataclass(frozen=True, kw_only=True)
class MethodEffect(ChangeSizes):
    """What the edit of one method does. The sizes are of the `known` facts.

    `own` is the relative change of the prompt's answer (-1 is gone), `others` the largest |relative change| of the
    run's other prompts, `norm` the Frobenius norm of what is taken; `slices` are None where the method chooses none.
    """

    slices: list[str] | None
    own: float
    others: float
    norm: float
    worst: WorstFact
    known: int


@dataclass(frozen=True, kw_only=True)
class PromptEffects:
    """One prompt of the table: its answer `token`, the probability `before`, and what each method's edit does.

    A method without an edit is left out, and `before` is ABSENT where there is none at all.
    """

    prompt: str
    token: str
    before: float | Absent = ABSENT
    edits: dict[str, MethodEffect]


def first_read(decomposition: Decomposition) -> str:
    """The matrix of the rule; SpdError where the run does not decompose it."""
    for name in decomposition.names:
        if any(fnmatchcase(name, pattern) for pattern in READS):
            return name
    raise SpdError("the run does not decompose the first MLP", "slices.matrices has to cover layers.0.mlp.up_proj")


def open_table(
    subject: Subject,
    decomposition: Decomposition,
    facts: Facts,
    subjects: Sequence[str],
    ridge: float,
    seed: int,
) -> FactContext:
    """The context of a run's table; `subjects` are, by prompt, the last token of its subject.

    SpdError where the run has no first MLP or no broad text, or where its model knows no fact; UsageError where a
    prompt does not have the token that `subjects` names for it.
    """
    matrix = first_read(decomposition)
    if subject.stream is None or subject.prompts is None:
        raise SpdError("the recipe names no broad text", "--set data.stream=generated")
    known = known_facts(subject, facts, subject.prompts.texts)
    if known is None:
        raise SpdError("the model knows none of the facts", "spd facts check MODEL says what it knows")
    texts = own_texts(subject, seed)
    naming = [[tuple(find_positions(texts, row, token))] for row, token in enumerate(subjects)]
    return fact_context(subject, decomposition, known, naming, [matrix], subject.stream(), ridge, seed)


def fact_table(context: FactContext) -> list[PromptEffects]:
    """What every method's edit does to each prompt of a run; without a slice by rule, the one by effect alone."""
    assert context.known is not None
    table = []
    for row, text in enumerate(context.prompts.texts):
        fact = fact_edits(context, row)
        methods = METHODS if fact.rule else ("effect",)
        edits = {method: fact.edits[method] for method in methods if method in fact.edits}
        on_prompts = measure_edits(context.target, context.prompts, edits)
        on_facts = measure_edits(context.target, context.known.questions, edits)
        effects = {
            method: method_effect(context, row, method, fact, on_prompts[method], on_facts[method]) for method in edits
        }
        before = next((changes[row].before for changes in on_prompts.values()), ABSENT)
        table.append(PromptEffects(prompt=text, token=context.prompts.tokens[row], before=before, edits=effects))
    return table


def method_effect(
    context: FactContext, row: int, method: str, fact: FactEdits, on_prompts: AnswerChanges, on_facts: AnswerChanges
) -> MethodEffect:
    """What one method's edit does to prompt `row`, to the other prompts and to the known facts."""
    slices = {"rule": list(fact.rule), "effect": list(fact.effect)}.get(method)
    ratios = torch.tensor([change.ratio for change in on_facts], dtype=torch.float64)
    sizes = summarise(relative_change(ratios), context.seed)
    worst = max(on_facts, key=lambda change: abs(change.ratio - 1))
    others = [abs(change.ratio - 1) for number, change in enumerate(on_prompts) if number != row]
    return MethodEffect(
        slices=None if slices is None else [str(address) for address in slices],
        own=on_prompts[row].ratio - 1,
        others=max(others, default=0.0),
        norm=edit_norm(fact.edits[method]),
        worst=WorstFact(worst.prompt, worst.ratio),
        known=len(on_facts),
        relative_change=sizes.relative_change,
        interval=sizes.interval,
        level=sizes.level,
    )
