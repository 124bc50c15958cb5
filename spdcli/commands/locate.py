"""`spd locate`: the slices that carry a prompt's answer, by suppressing every one that is active in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spdcli.commands.edit_options import FactsOption, KeptText, NoFacts, TextTokens, read_facts
from spdcli.commands.opening import opened
from spdcli.commands.options import (
    Device,
    Json,
    Matrices,
    MatrixPattern,
    Quiet,
    RunPath,
    Seed,
    Threshold,
    Verbose,
    make_console,
)
from spdcli.commands.prompt_option import prompt_option, read_prompts
from spdcli.edits.choices import STATISTICS, USUAL_STATISTIC

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.location.locate import PairEntry, PromptSearch, SliceEntry

if TYPE_CHECKING:
    Statistic = str
else:
    Statistic = Literal[tuple(STATISTICS)]

Prompt = Annotated[
    list[str] | None,
    prompt_option("Look for the answer of this, its last token, which is not fed", "each prompt of the run"),
]
Token = Annotated[
    str | None,
    typer.Option("--token", "-t", help="The answer to look at, as text or as #id.", show_default="the last token"),
]
Top = Annotated[int, typer.Option("--top", min=1, max=10**6, help="Slices to tell.")]
Paired = Annotated[
    int, typer.Option("--paired", min=0, max=10**6, help="Measure the pairs among so many of the strongest.")
]
Pairs = Annotated[int, typer.Option("--pairs", min=1, max=10**6, help="Pairs to tell.")]
Limit = Annotated[
    float | None,
    typer.Option(
        "--others-limit", min=0.0, help="Tell only what has no more collateral than this.", show_default=False
    ),
]
By = Annotated[Statistic, typer.Option("--collateral", help="The statistic of others' changes that counts.")]


def locate(
    run: RunPath,
    prompt: Prompt = None,
    token: Token = None,
    matrix: MatrixPattern = None,
    matrices: Matrices = None,
    top: Top = 10,
    paired: Paired = 12,
    pairs: Pairs = 5,
    others_limit: Limit = None,
    collateral: By = USUAL_STATISTIC,
    facts: FactsOption = None,
    no_facts: NoFacts = False,
    text: KeptText = None,
    text_tokens: TextTokens = 100_000,
    threshold: Threshold = 0.0,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find the slices that carry an answer: suppress each that is active in the prompt, and measure.

    The effect is on the answer's probability; the collateral is the relative
    change of the run's other prompts and of the facts that the model knows.
    Pairs are told that do more together than the sum of their parts.
    """
    console = make_console(json, quiet, verbose)
    file, prompts = read_facts(facts, no_facts), read_prompts(prompt)
    from spdcli.edits.text_changes import text_to_keep
    from spdcli.location.locate import Search
    from spdcli.location.locate import locate as locate_slices
    from spdcli.records import plain

    loaded = opened(console, run, device)
    if loaded.subject.prompts is None and facts is None:
        file = None  # the toy knows none of those that come with spd
    patterns = [*(matrix or []), *(matrices or [])] or ["*"]
    search = Search(tuple(patterns), top, paired, pairs, collateral, others_limit, threshold)
    with console.progress() as report:
        kept = None if text is None else text_to_keep(loaded.recipe, loaded.subject, text, text_tokens, report)
        own, seed = (loaded.subject, loaded.decomposition), loaded.seed_or(seed)
        searches = locate_slices(*own, prompts, token, file, search, seed, kept, report)
    data = {"schema": "spd.locate/1", "run": run, **plain(searches[0]), "located": searches}
    console.show(data, *[part for one in searches for part in render(one)])
    if quiet:
        for one in searches:
            for entry in one.slices:
                console.result(entry.slice)


def render(search: PromptSearch) -> list[RenderableType]:
    """The slices by effect, and the pairs that do more than their sum."""
    limit = "" if search.limit is None else f", {search.statistic} collateral at most {search.limit:g}"
    title = f"{search.token!r} of {search.prompt!r}: {search.before:.4f} before"
    title += f"; {search.candidates} active slices{limit}"
    parts: list[RenderableType] = [title, table(search.slices, "slice", search.known_facts)]
    if search.pairs:
        above = f"{search.pairs_above_sum} of {search.pairs_measured} pairs do more than their sum in log-probability"
        parts += [above, table(search.pairs, "pair", search.known_facts)]
    elif search.pairs_measured:
        parts.append(f"None of {search.pairs_measured} pairs that may be told does more than the sum of its parts.")
    return parts


def table(entries: Sequence[SliceEntry | PairEntry], kind: str, known_facts: int) -> RenderableType:
    """A row an entry: what becomes of the answer, of the other prompt that moves most, and of the known facts."""
    from rich.table import Table

    from spdcli.location.locate import PairEntry

    effects = Table(expand=True)
    facts = ["facts: median, mean, max"] if known_facts else []
    excess = ["excess"] if kind == "pair" else []
    text = ["text: KL, 99 %"] if any(entry.text for entry in entries) else []
    for column in (kind, "after", "change", *excess, "KL", "others", *facts, *text, "collateral"):
        effects.add_column(column, justify="left" if column == kind else "right", overflow="fold")
    for entry in entries:
        effects.add_row(
            "\n".join(entry.slices) if isinstance(entry, PairEntry) else entry.slice,
            f"{entry.after:.4f}",
            f"{entry.ratio - 1:+.1%}",
            *([f"{entry.excess:+.2f}"] if isinstance(entry, PairEntry) else []),
            f"{entry.kl:.3f}",
            f"{max(entry.others):.1%}" if entry.others else "",
            *([", ".join(f"{value:.1%}" for value in entry.facts.values())] if entry.facts else []),
            *([f"{entry.text.kl_p99:.1e}"] if entry.text else []),
            "" if entry.collateral is None else f"{entry.collateral:.2%}",
        )
    return effects
