"""The report on a run's facts: where each is, what suppressing it does to everything else, and what leaks.

One table a fact, with one row an intervention and three things that it changes: the fact's own answer, the answers of
the run's other prompts, and the other facts that the model knows. Changes are after / before - 1 of P(answer); over
the known facts it is the median, mean and largest of their absolute values, with bootstrap intervals.

Causal tracing's rows are no edits of the weights: in the clean run, the piece at the best site is replaced by that of
the run with the corrupted subject (mean over draws). They say nothing about other prompts, whose pieces they are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from spdcli.edits.answer_changes import AnswerChanges, measure_edits
from spdcli.edits.facts_file import Facts
from spdcli.edits.known_facts import fact_questions, known_facts
from spdcli.edits.suppression import Address
from spdcli.edits.text_changes import TextToKeep, text_changes
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Batch
from spdcli.errors import UsageError
from spdcli.location.fact_context import (
    FactContext,
    chosen_matrix,
    fact_context,
    matrix_like,
    naming_tokens,
)
from spdcli.location.report_edits import ReportEdits, report_edits
from spdcli.location.report_rows import ZEROED, ReportRow, edit_rows, one_row, traced_rows
from spdcli.location.subject_prompts import subject_prompts
from spdcli.location.tracing import ON_SUBJECT, Trace, TraceSettings, trace_prompt
from spdcli.location.zeroed_layers import ZeroedLayers, zeroed_layers
from spdcli.measures.evidence import Evidence
from spdcli.measures.evidence_choices import NO_SEARCH
from spdcli.measures.language_evaluation import evaluate_language_model
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.schema import Data
from spdcli.records import ABSENT, Absent
from spdcli.runs.subject import Subject, require_tokens
from spdcli.targets.broad_text import generated_text
from spdcli.targets.prompts import encode

LEAKS = ("rule", "effect", "direct")  # the edits that related prompts are asked after


@dataclass(frozen=True)
class ReportSettings:
    """`trace` as for `spd trace`; how many `random` directions are a control; the edited matrix (None: see
    `chosen_matrix`)."""

    trace: TraceSettings = field(default_factory=lambda: TraceSettings(samples=3))
    random: int = 3
    matrix: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class ChosenSlices:
    """The addresses of a fact's slices, by rule and by effect; empty where there is none."""

    rule: list[str]
    effect: list[str]


@dataclass(frozen=True)
class SliceEffect:
    """Slices by rule suppressed together, which were taken at `tokens`: P(answer) of every prompt of the run before
    and after, and after / before (Figures 3 and 4)."""

    slices: list[str]
    tokens: list[str]
    before: list[float]
    after: list[float]
    ratio: list[float]


@dataclass(frozen=True)
class Leak:
    """What one edit leaves of the answer of a related prompt."""

    after: float
    ratio: float
    rank_after: int


@dataclass(frozen=True)
class RelatedPrompt:
    """The fact in other words or asked in reverse (`kind`), its answer `token` before, and after `edits` by name."""

    kind: str
    prompt: str
    token: str
    before: float
    rank_before: int
    edits: dict[str, Leak]


@dataclass(frozen=True)
class FactReport:
    """Everything about one prompt's fact. `before` is P(answer) of the model as it is.

    `tokens` are what is fed, as text, and `subject` the positions of what the prompt is about; `named_at` those that
    the edits without a decomposition are of. `slices` has the rule's slices each alone, then all of them together.
    """

    prompt: str
    answer: str
    tokens: Sequence[str]
    subject: Sequence[int]
    trace: Trace
    second_matrix: str
    before: float
    chosen: ChosenSlices
    named_at: Sequence[int]
    rows: list[ReportRow]
    slices: list[SliceEffect]
    related: list[RelatedPrompt]


@dataclass(frozen=True)
class FactCounts:
    """How many other facts were asked, and how many of them the unchanged model knows."""

    asked: int
    known: int


@dataclass(frozen=True)
class RunReport:
    """What `spd.report/1` says of a run: the edited matrix, every MLP layer zeroed (changes of the prompts by label),
    each prompt's fact, and what the reconstruction by masked slices is worth as `evidence`, no masks sought."""

    matrix: str
    facts: FactCounts
    mlp_zeroed: Mapping[str, AnswerChanges]
    prompts: list[FactReport]
    evidence: Evidence | Absent = ABSENT


def report_facts(
    subject: Subject,
    decomposition: Decomposition,
    data: Data | None,
    ridge: float,
    facts: Facts,
    subjects: Sequence[str] = (),
    settings: ReportSettings | None = None,
    text: TextToKeep | None = None,
    report: Report = silent,
) -> RunReport:
    """The report on the facts of a run's prompts: `data` and `ridge` are its recipe's `[data]` and `slices.ridge`.

    `subjects` are words that the prompts are about, and those that `facts` names come after them; `text` should stay as
    it is under every edit. UsageError for the toy, and for a prompt without a subject.
    """
    require_tokens(subject)
    if subject.prompts is None or data is None:
        raise UsageError("a report is about facts, and the induction toy knows none", "spd eval explains the toy")
    if data.prompts is None:
        raise UsageError("a report is about a recipe's prompts, and this run was decomposed on text without any")
    settings = settings or ReportSettings()
    steps = iter(range(1, 1000))
    tell = lambda text: report(Progress(text, next(steps), 4 + 2 * len(data.prompts)))  # noqa: E731
    prompts = encode(subject.prompts.tokenizer, data.prompts, "held_out", subject.prompts.begin_token)
    about = subject_prompts(prompts, subjects, facts.subjects())
    matrix = chosen_matrix(subject.target, decomposition.names, settings.matrix)
    tell("which facts the model knows")
    known = known_facts(subject, facts, data.prompts)
    traces = []
    for prompt in about:
        tell(f"causal tracing: {prompt.text}")
        traces.append(trace_prompt(subject.target, prompt, settings.trace))
    seconds = [matrix_like(subject.target, matrix, one.best_site("mlp", ON_SUBJECT).layer) for one in traces]
    tell("what is usual in broad text")
    naming = [naming_tokens(prompt.subject) for prompt in about]
    stream = broad_text(subject, data, settings.seed)
    context = fact_context(
        subject, decomposition, known, naming, [matrix, *seconds], stream, ridge, settings.seed, text
    )
    tell("MLP layers zeroed, one after the other")
    zeroed = zeroed_layers(context)
    reports = []
    for row, (trace, second) in enumerate(zip(traces, seconds, strict=True)):
        tell(f"edits: {trace.prompt}")
        reports.append(fact_report(context, row, trace, second, zeroed, facts, prompts.begin_token, settings.random))
    counts = FactCounts(len(facts.without(data.prompts)), len(known.questions.texts) if known else 0)
    evidence = evaluate_language_model(subject, decomposition, 0.0, settings.seed, NO_SEARCH).evidence
    return RunReport(matrix, counts, zeroed.prompts, reports, evidence)


def broad_text(subject: Subject, data: Data, seed: int) -> Batch:
    """The recipe's broad text, or text that is sampled from the target where the recipe names none."""
    if subject.stream is not None:
        return subject.stream()
    assert subject.prompts is not None
    model: Any = subject.target.model
    assert data.sequences is not None
    text = generated_text(model, subject.prompts.tokenizer, data.sequences, 0, data.length, seed)
    return Batch.everywhere(text.training.read(torch.arange(data.sequences))).to(subject.target.device)


def fact_report(
    context: FactContext,
    row: int,
    trace: Trace,
    second: str,
    zeroed: ZeroedLayers,
    facts: Facts,
    begin_token: bool,
    random: int,
) -> FactReport:
    """The report on the fact of prompt `row`, which `trace` has traced; `second` is the second matrix."""
    edits = report_edits(context, row, trace.tokens, second, random)
    known = context.known
    on_prompts = measure_edits(context.target, context.prompts, edits.by_name)
    in_table = {name: edits.by_name[name] for one in edits.rows for name in one.edits}
    on_facts = {} if known is None else measure_edits(context.target, known.questions, in_table)
    alone = {name: in_table[name] for one in edits.rows if len(one.edits) == 1 for name in one.edits}
    on_text = {} if context.text is None else text_changes(context.target, alone, context.text.parts())
    rows = traced_rows(trace)
    for layer in dict.fromkeys((0, zeroed.needed[row])):
        changes = zeroed.prompts[f"mlp {layer}"]
        rows.append(one_row(f"MLP {layer} zeroed", ZEROED, changes, zeroed.facts.get(layer), row, known))
    for one in edits.rows:
        rows += edit_rows(one, on_prompts, on_facts, row, known, on_text)
    return FactReport(
        prompt=trace.prompt,
        answer=trace.answer,
        tokens=trace.tokens,
        subject=trace.subject,
        trace=trace,
        second_matrix=second,
        before=on_prompts["direct"][row].before,
        chosen=ChosenSlices([str(one) for one in edits.fact.rule], [str(one) for one in edits.fact.effect]),
        named_at=edits.fact.positions,
        rows=rows,
        slices=slice_effects(edits, on_prompts, trace.tokens),
        related=related_prompts(context, edits, facts, trace.prompt, begin_token),
    )


def slice_effects(
    edits: ReportEdits, on_prompts: Mapping[str, AnswerChanges], tokens: Sequence[str]
) -> list[SliceEffect]:
    """The rule's slices, each suppressed alone and then all together, on every prompt (Figures 3 and 4)."""

    def effect(edit: str, slices: Mapping[Address, Sequence[int]]) -> SliceEffect:
        changes = on_prompts[edit]
        positions = sorted({position for taken_at in slices.values() for position in taken_at})
        return SliceEffect(
            slices=[str(address) for address in slices],
            tokens=[tokens[position] for position in positions],
            before=[change.before for change in changes],
            after=[change.after for change in changes],
            ratio=[change.ratio for change in changes],
        )

    rule = edits.fact.rule
    alone = [effect(str(address), {address: positions}) for address, positions in rule.items()]
    return alone if len(alone) < 2 else [*alone, effect("rule", rule)]


def related_prompts(
    context: FactContext, edits: ReportEdits, facts: Facts, prompt: str, begin_token: bool
) -> list[RelatedPrompt]:
    """The fact in other words and asked in reverse, before and after the edits of LEAKS: what leaks."""
    related = facts.related_to(prompt)
    if not related:
        return []
    assert context.subject.prompts is not None
    tokenizer = context.subject.prompts.tokenizer
    questions = fact_questions(tokenizer, related, begin_token, context.target.device)
    leaking = {name: edits.by_name[name] for name in LEAKS if name in edits.by_name}
    by_edit = measure_edits(context.target, questions, leaking)
    entries = []
    for number, one in enumerate(related):
        changes = {name: by_prompt[number] for name, by_prompt in by_edit.items()}
        first = next(iter(changes.values()))
        leaks = {name: Leak(change.after, change.ratio, change.rank_after) for name, change in changes.items()}
        entries.append(RelatedPrompt(one.kind, one.prompt, first.token, first.before, first.rank_before, leaks))
    return entries
