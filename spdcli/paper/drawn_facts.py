"""Facts that nobody chose: drawn by a seed, decomposed together, each cut by a rule that was settled on others.

The rule (`drawn_edits.py`) was settled on the prompts of the shipped recipe, which are facts drawn before; LOOKED_AT
were looked at before there was a rule. Neither are drawn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spdcli.api import prepared
from spdcli.disk import write_json
from spdcli.edits.facts_file import Fact, Facts
from spdcli.edits.known_facts import known_facts
from spdcli.edits.text_changes import text_changes, text_to_keep
from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import SpdError
from spdcli.location.fact_context import FactContext, fact_context
from spdcli.location.subject_prompts import subject_positions
from spdcli.paper.drawn_edits import METHODS, DrawnEdit, drawn_edits, measured_edits
from spdcli.paper.fact_table import first_read
from spdcli.paper.verdict import REPORT
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.reading import LoadedRecipe, load_recipe
from spdcli.records import plain
from spdcli.runs.decomposition import read_decomposition
from spdcli.runs.directory import DECOMPOSITION
from spdcli.runs.memory import MemoryRun
from spdcli.runs.opening import claimed_run
from spdcli.runs.subject import Subject
from spdcli.runs.training import finish_run

SCHEMA = "spd.facts.drawn/1"
SHARE = 0.6  # of the facts that have to be cut with all bounds on others held
TEXT_TOKENS = 2048  # of the run's held-out text
LOOKED_AT = (
    *("Kobe Bryant", "Tiger Woods", "Lionel Messi", "Michael Jordan", "Serena Williams", "Pablo Picasso"),
    *("Claude Monet", "Mona Lisa", "relativity", "evolution", "Eiffel Tower", "Acropolis", "Colosseum", "Kremlin"),
)


@dataclass(frozen=True)
class DrawnFact:
    """One fact, the probability of its answer `token` before, and what each method does; a method that finds no slice
    is left out."""

    prompt: str
    subject: str
    token: str
    before: float
    edits: Mapping[str, DrawnEdit]


@dataclass(frozen=True, kw_only=True)
class MethodCount:
    """Of all facts: how many a method has an `edit` of, `cut` by FALL, and cut while the bounds on others hold, and
    while that on the tail does, too."""

    method: str
    edits: int
    cut: int
    cut_and_spared: int
    cut_and_tail_spared: int


@dataclass(frozen=True, kw_only=True)
class DrawnExperiment:
    """`spd.facts.drawn/1`: the facts that were drawn, and how many of them each method cuts.

    `passed` where the rule cuts SHARE of them and spares the others.
    """

    recipe: str
    seed: int
    run: str
    passed: bool
    methods: list[MethodCount]
    facts: list[DrawnFact]

    def failure(self) -> SpdError | None:
        """The error that ends an experiment which did not pass."""
        if self.passed:
            return None
        return SpdError(f"the rule cuts and spares {self.methods[0].cut_and_spared} of {len(self.facts)} facts")


def reproduce_drawn(
    recipe: str,
    out: Path,
    facts: Facts,
    count: int = 20,
    skip: int = 0,
    settings: Sequence[str] = (),
    device: str | None = None,
    force: bool = False,
    report: Report = silent,
) -> DrawnExperiment:
    """So many facts that the model knows and that neither the recipe nor LOOKED_AT has, drawn by the recipe's seed,
    of which the first `skip` are passed over: decomposed together into OUT/drawn, then cut one by one. Writes
    OUT/reproduce.json.

    RecipeError for a recipe without a language model; SpdError where it knows too few facts.
    """
    first = load_recipe(recipe, settings, device=device)
    if first.recipe.target.kind != "huggingface" or first.recipe.data is None:
        raise first.error("target.kind", "[target] kind: facts are those of a language model")
    drawn = draw_facts(first, facts, count, skip, report)
    prompts = f"data.prompts={json.dumps([fact.prompt for fact in drawn])}"
    loaded = load_recipe(recipe, [*settings, prompts], device=device)
    run = claimed_run(out / "drawn", loaded, force, report)
    report(Progress(f"{count} facts decomposed together in {run.path}"))
    subject = prepared(run, loaded, report)
    finish_run(run, loaded, lambda: subject, report)
    decomposition = read_decomposition(run / DECOMPOSITION, loaded.recipe, subject, run.way_back)
    table = fact_rows(loaded, subject, decomposition, facts, drawn, report)
    methods = [count_of(method, table) for method in METHODS]
    experiment = DrawnExperiment(
        recipe=recipe,
        seed=loaded.recipe.seed,
        run=str(run.path),
        passed=methods[0].cut_and_spared >= SHARE * len(table),
        methods=methods,
        facts=table,
    )
    write_json(out / REPORT, {"schema": SCHEMA, **plain(experiment)})
    return experiment


def draw_facts(loaded: LoadedRecipe, facts: Facts, count: int, skip: int = 0, report: Report = silent) -> list[Fact]:
    """So many `facts` that the recipe's model knows, in an order by its seed, without its prompts and LOOKED_AT, and
    without the first `skip` of them.

    SpdError where there are fewer that name their subject.
    """
    subject = prepared(MemoryRun(), loaded, report)
    assert loaded.recipe.data is not None
    known = known_facts(subject, facts, loaded.recipe.data.prompts or [])
    texts = [] if known is None else known.questions.texts
    fresh = [
        fact
        for fact in facts.fact
        if fact.prompt in texts and fact.subject and not any(name in fact.subject for name in LOOKED_AT)
    ]
    random.Random(loaded.recipe.seed).shuffle(fresh)
    left = fresh[skip : skip + count]
    if len(left) < count:
        raise SpdError(f"{len(left)} facts that this model knows are left to draw, not {count}", "--count draws fewer")
    return left


def fact_rows(
    loaded: LoadedRecipe,
    subject: Subject,
    decomposition: Decomposition,
    facts: Facts,
    drawn: Sequence[Fact],
    report: Report = silent,
) -> list[DrawnFact]:
    """Every drawn fact with what each method's edit of it does."""
    assert subject.prompts is not None
    context = drawn_context(loaded, subject, decomposition, facts, drawn)
    rows, rules = [], {}
    for number, fact in enumerate(drawn):
        report(Progress(f"fact {number + 1} of {len(drawn)}: {fact.prompt}"))
        assert fact.subject is not None
        edits, slices = drawn_edits(context, number, loaded.recipe.slices.distinct)
        before, measured = measured_edits(context, number, fact.subject, edits, slices)
        rows.append(DrawnFact(fact.prompt, fact.subject, context.prompts.tokens[number], before, measured))
        if "rule" in edits:
            rules[number] = edits["rule"]
    report(Progress("ordinary text"))
    text = text_to_keep(loaded.recipe, subject, "own", TEXT_TOKENS, report)
    changes = text_changes(subject.target, {str(number): edit for number, edit in rules.items()}, text.parts(report))
    for number in rules:
        own = rows[number]
        rule = replace(own.edits["rule"], text=changes[str(number)])
        rows[number] = replace(own, edits={**own.edits, "rule": rule})
    return rows


def drawn_context(
    loaded: LoadedRecipe, subject: Subject, decomposition: Decomposition, facts: Facts, drawn: Sequence[Fact]
) -> FactContext:
    """What all edits share; every token of a subject names it. SpdError where the recipe names no broad text."""
    if subject.stream is None or subject.prompts is None:
        raise SpdError("the recipe names no broad text", "--set data.stream=generated")
    naming = [
        [(position,) for position in subject_positions(subject.prompts, number, fact.subject or "")]
        for number, fact in enumerate(drawn)
    ]
    known = known_facts(subject, facts, subject.prompts.texts)
    matrix, ridge = first_read(decomposition), loaded.recipe.slices.ridge
    return fact_context(subject, decomposition, known, naming, [matrix], subject.stream(), ridge, loaded.recipe.seed)


def count_of(method: str, rows: Sequence[DrawnFact]) -> MethodCount:
    """How many facts a method cuts."""
    edits: list[DrawnEdit] = [row.edits[method] for row in rows if method in row.edits]
    return MethodCount(
        method=method,
        edits=len(edits),
        cut=sum(edit.cut for edit in edits),
        cut_and_spared=sum(edit.cut and edit.spares for edit in edits),
        cut_and_tail_spared=sum(edit.cut and edit.spares_tail for edit in edits),
    )
