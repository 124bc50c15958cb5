"""How commands that change a model show what that does: tables of answers and facts, and the lines of `-q`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spdcli.console import Console

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.edits.answer_changes import AnswerChange, AnswerChanges
    from spdcli.edits.collateral import Collateral
    from spdcli.edits.editing_scores import EditingScores
    from spdcli.edits.text_changes import TextChange
    from spdcli.records import Absent

ACTIVE_MARK = "* one of the slices is active in this prompt"
SHOWN_ALONE = 6  # prompts that a table has a column for
SHOWN_NAMES = 3  # in a title


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
    every = [effects_table("Facts", [effect for effect in effects if effect.group == "fact"])] if verbose else []
    return [title, table, f"most moved: {worst}", *every]


def scores_tables(scores: Mapping[str, EditingScores] | Absent) -> list[RenderableType]:
    """Efficacy, paraphrase and specificity, a row for each of where they come from."""
    from rich.table import Table

    if not scores:
        return []
    table = Table(title="Scores of the edit: shares of prompts, and their harmonic mean")
    for name in ("on", "efficacy", "paraphrase", "specificity", "score"):
        table.add_column(name, justify="left" if name == "on" else "right")
    for source, own in scores.items():
        shares = (own.efficacy, own.paraphrase, own.specificity)
        shown = ["–" if one.after is None else f"{one.after:.0%} of {one.prompts}" for one in shares]
        table.add_row(source, *shown, "–" if own.score is None else f"{own.score:.0%}")
    return [table]


def text_tables(texts: Mapping[str, TextChange | Absent]) -> list[RenderableType]:
    """How far an edit moves a text, a row an edit; nothing where none was read."""
    from rich.table import Table

    rows = {name: text for name, text in texts.items() if text}
    if not rows:
        return []
    table = Table(title="KL a token of the text, nats")
    for name in ("edit", "tokens", "mean", "median", "99 %", "max"):
        table.add_column(name, justify="left" if name == "edit" else "right")
    for name, text in rows.items():
        table.add_row(
            name, f"{text.tokens:,}", *map("{:.1e}".format, (text.kl_mean, text.kl_median, text.kl_p99, text.kl_max))
        )
    return [table]


def prompts_only(effects: AnswerChanges) -> list[AnswerChange]:
    """The effects that are not on facts."""
    return [effect for effect in effects if effect.group != "fact"]


def effects_table(title: str, effects: AnswerChanges) -> RenderableType:
    """One row a prompt; * marks those in which one of the slices is active, and a line below says so."""
    from rich.table import Table

    caption = ACTIVE_MARK if any(effect.active for effect in effects) else None
    table = Table(title=title, caption=caption, expand=True)
    table.add_column("prompt", ratio=1)
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


def _probability(p: float) -> str:
    return f"{p:.4f}" if p >= 0.001 else f"{p:.1e}"


def in_title(names: Sequence[str]) -> str:
    """Names for a title; many are only counted."""
    return ", ".join(names) if len(names) <= SHOWN_NAMES else f"{len(names)} at once"


def alone_table(alone: Mapping[str, AnswerChanges]) -> list[RenderableType]:
    """What each change does by itself: a row a change, a column a prompt, or three columns over many prompts."""
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
