"""What commands that change a model share: options, prompts, facts, and tables of effects."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spdcli.console import Console
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.edits.answer_changes import AnswerChange, AnswerChanges, Questions
    from spdcli.edits.facts_file import Facts
    from spdcli.edits.known_facts import AskedFacts, Collateral
    from spdcli.edits.suppression import Address
    from spdcli.recipe.schema import Recipe
    from spdcli.runs.loading import LoadedRun
    from spdcli.runs.subject import Subject

SliceAddress = Annotated[
    list[str] | None,
    typer.Option("--slice", "-s", help="MATRIX:INDEX, as spd inspect shows it; may be repeated.", show_default=False),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        "-p",
        help="Ask this instead of the run's prompts; its last token is the answer. '-' reads lines from stdin.",
        show_default=False,
    ),
]
FactsOption = Annotated[
    str | None,
    typer.Option(
        "--facts",
        metavar="FILE|builtin",
        help="Facts that should stay as they are: a file, or those that come with spd.",
        show_default="builtin, for a language model",
    ),
]
NoFacts = Annotated[bool, typer.Option("--no-facts", help="Measure no facts.")]
Sequences = Annotated[int, typer.Option("--sequences", min=1, help="Fresh toy sequences to measure on.")]
SHOWN_ALONE = 6  # prompts that a table has a column for
SHOWN_NAMES = 3  # in a title


def read_prompts(prompts: Sequence[str] | None) -> list[str]:
    """The texts of `--prompt`, with standard input's lines, one a prompt, in the place of `-`."""
    texts: list[str] = []
    for text in prompts or ():
        if text != "-":
            texts.append(text)
            continue
        lines = [line for line in sys.stdin.read().splitlines() if line.strip()]
        if not lines:
            raise UsageError("--prompt -: standard input has no prompt", "give one a line")
        texts += lines
    return texts


def ask_questions(subject: Subject, recipe: Recipe, texts: Sequence[str], sequences: int, seed: int) -> Questions:
    """The questions of a run, or of `texts` where there are any."""
    from spdcli.edits.answer_changes import given_questions, own_questions

    if not texts:
        return own_questions(subject, sequences, seed)
    return given_questions(subject, texts, recipe.data is not None and recipe.data.begin_token)


def read_facts(option: str | None, without: bool) -> Facts | None:
    """The facts of `--facts`, the shipped ones when nothing is said, or None with `--no-facts`."""
    from spdcli.edits.facts_file import load_facts

    if without:
        if option is not None:
            raise UsageError("--facts and --no-facts contradict each other", "give one of the two")
        return None
    return load_facts(None if option in (None, "builtin") else Path(option))


def own_prompts(recipe: Recipe, texts: Sequence[str]) -> list[str]:
    """What is no other fact: the run's prompts, and `texts` that are asked in their place."""
    return [*(recipe.data.prompts if recipe.data is not None else ()), *texts]


def ask_facts(
    console: Console, subject: Subject, recipe: Recipe, facts: Facts | None, option: str | None, own: Sequence[str]
) -> AskedFacts | None:
    """The facts that are none of the texts `own`; None where there are none.

    UsageError when `--facts` asks the toy for facts.
    """
    from spdcli.edits.known_facts import facts_beside

    if subject.prompts is None and option is not None:
        raise UsageError("the induction toy knows no facts", "leave --facts out")
    if subject.prompts is None or facts is None:
        return None
    assert recipe.data is not None
    asked, dropped = facts_beside(subject, facts, own, recipe.data.begin_token)
    if dropped:
        console.warn(f"{dropped} facts are longer than this model takes, and are left out")
    return asked


def facts_tables(facts: Collateral | None, effects: AnswerChanges, verbose: bool) -> list[RenderableType]:
    """What an edit does to the facts that the model knows, and with `-v` to each fact."""
    from rich.table import Table

    if facts is None:
        return []
    if not facts.known:
        return [f"Of {facts.asked} facts this model knows none."]
    assert facts.level
    assert facts.interval
    level = f"{facts.level:.0%} interval"
    title = f"The {facts.known} known of {facts.asked} other facts: |after / before - 1| of each"
    table = Table()
    for name in ("", "change", level):
        table.add_column(name, justify="right" if name else "left")
    for name, bounds in facts.interval.items():
        assert bounds is not None
        low, high = bounds
        table.add_row(name, f"{facts.relative_change[name]:.2%}", f"{low:.2%} to {high:.2%}")
    worst = ", ".join(f"{fact.prompt} {fact.ratio - 1:+.1%}" for fact in facts.worst)
    every = [effects_table("Facts", [e for e in effects if e.group == "fact"])] if verbose else []
    return [title, table, f"most moved: {worst}", *every]


def prompts_only(effects: AnswerChanges) -> list[AnswerChange]:
    """The effects that are not on facts."""
    return [effect for effect in effects if effect.group != "fact"]


def warn_of_span(console: Console, recipe: Recipe, texts: Sequence[str]) -> None:
    """Say so where importances are read off text that a run's gates do not see whole."""
    if texts and recipe.importance.basis == "span":
        console.warn("this run's gates see only the span of its own prompts; on other text they are a projection")


def mark_active(
    loaded: LoadedRun, questions: Questions, addresses: Sequence[Address], effects: AnswerChanges
) -> list[AnswerChange]:
    """The effects with `active` set: which of the slices are active in the prompt; None for text too long."""
    from spdcli.edits.answer_changes import active_on

    try:
        own: Sequence[list[str] | None] = active_on(loaded.subject, loaded.decomposition, questions, addresses)
    except UsageError:
        own = [None] * len(effects)
    return [replace(effect, active=active) for effect, active in zip(effects, own, strict=True)]


def effects_table(title: str, effects: AnswerChanges) -> RenderableType:
    """One row a prompt; * marks those in which one of the slices is active."""
    from rich.table import Table

    table = Table(title=title, expand=True)
    table.add_column("prompt", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("*")
    for name in ("answer", "before", "after", "change", "rank", "KL"):
        table.add_column(name, justify="left" if name == "answer" else "right", no_wrap=True)
    for effect in effects:
        table.add_row(
            effect.prompt,
            "*" if effect.active else "",
            repr(effect.token),
            _probability(effect.before),
            _probability(effect.after),
            f"{effect.ratio - 1:+.1%}",
            f"{effect.rank_before} → {effect.rank_after}",
            f"{effect.kl:.4f}",
        )
    return table


def listed(names: Sequence[str]) -> str:
    """Names for a title; many are only counted."""
    return ", ".join(names) if len(names) <= SHOWN_NAMES else f"{len(names)} at once"


def _probability(p: float) -> str:
    return f"{p:.4f}" if p >= 0.001 else f"{p:.1e}"


def alone_table(alone: Mapping[str, AnswerChanges]) -> list[RenderableType]:
    """What each change does by itself: a row a change, a column a prompt, or two columns over many prompts."""
    from rich.table import Table

    if not alone:
        return []
    table = Table(title="Each alone: change of the answer's probability")
    table.add_column("", no_wrap=True)
    first = next(iter(alone.values()))
    few = len(first) <= SHOWN_ALONE
    for name in [repr(effect.token) for effect in first] if few else ["median", "lowest", "highest"]:
        table.add_column(name, justify="right")
    for label, effects in alone.items():
        ratios = [effect.ratio for effect in effects]
        shown = ratios if few else [statistics.median(ratios), min(ratios), max(ratios)]
        table.add_row(label, *(f"{ratio - 1:+.1%}" for ratio in shown))
    return [table]


def quiet_lines(console: Console, effects: AnswerChanges) -> None:
    """With `-q`, a line a prompt: the answer's probability before and after, and the KL, apart by tabs. None a fact."""
    if console.quiet:
        for effect in prompts_only(effects):
            console.result(f"{effect.before:.6g}\t{effect.after:.6g}\t{effect.kl:.6g}")
