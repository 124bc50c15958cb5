"""`spd locate`: the slices that carry a prompt's answer, by suppressing every one that is active in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spdcli.commands.change import FactsOption, NoFacts, ask_facts, own_prompts, read_facts
from spdcli.commands.options import Device, Json, Quiet, RunPath, Seed, Threshold, Verbose, make_console
from spdcli.edits.choices import STATISTICS, USUAL_STATISTIC

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.console import Console
    from spdcli.edits.answer_changes import Questions
    from spdcli.edits.facts_file import Facts
    from spdcli.edits.selection import Activity
    from spdcli.location.locate import Search
    from spdcli.runs.loading import LoadedRun


if TYPE_CHECKING:
    Statistic = str
else:
    Statistic = Literal[tuple(STATISTICS)]

Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        help="A prompt of the run by number or text, or another text; its last token is not fed.",
        show_default="each prompt of the run",
    ),
]
Token = Annotated[
    str | None,
    typer.Option("--token", "-t", help="The answer to look at, as text or as #id.", show_default="the last token"),
]
Matrices = Annotated[
    list[str] | None,
    typer.Option("--matrices", "-m", help="Look in matrices of this pattern; may be repeated.", show_default="all"),
]
Top = Annotated[int, typer.Option("--top", min=1, help="Slices to tell.")]
Paired = Annotated[int, typer.Option("--paired", min=0, help="Measure the pairs among so many of the strongest.")]
Pairs = Annotated[int, typer.Option("--pairs", min=1, help="Pairs to tell.")]
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
    matrices: Matrices = None,
    top: Top = 10,
    paired: Paired = 12,
    pairs: Pairs = 5,
    others_limit: Limit = None,
    collateral: By = USUAL_STATISTIC,
    facts: FactsOption = None,
    no_facts: NoFacts = False,
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
    file = read_facts(facts, no_facts)
    from spdcli.location.locate import Search
    from spdcli.runs.loading import load

    loaded = load(run, device)
    console.debug(str(loaded))
    search = Search(tuple(matrices or ["*"]), top, paired, pairs, collateral, others_limit, threshold)
    seed = loaded.recipe.seed if seed is None else seed
    located = find(console, loaded, (prompt, token), (file, facts), search, seed)
    data = {"schema": "spd.locate/1", "run": run, **located[0], "located": located}
    console.show(data, *[part for one in located for part in render(one)])
    if quiet:
        for one in located:
            for entry in one["slices"]:
                console.result(entry["slice"])


def find(
    console: Console,
    loaded: LoadedRun,
    asked: tuple[str | None, str | None],
    facts: tuple[Facts | None, str | None],
    search: Search,
    seed: int,
) -> list[dict[str, Any]]:
    """What is located for the prompt and token of `asked`, or for each prompt of the run."""
    from spdcli.edits.prompts_and_answers import about_token, pick
    from spdcli.edits.selection import own_activity
    from spdcli.location.locate import candidates, known_questions
    from spdcli.location.locate import locate as search_slices

    prompt, token = asked
    subject, decomposition = loaded.subject, loaded.decomposition
    activity, own = own_activity(subject, decomposition, seed)
    row = own_row(prompt, own)
    texts = [] if row is not None or prompt is None else [prompt]
    told = ask_facts(console, subject, loaded.recipe, facts[0], facts[1], own_prompts(loaded.recipe, texts))
    known = known_questions(subject, told)
    located = []
    for number in range(len(own.texts)) if prompt is None else [row]:
        here, question = (activity, pick(own, [number])) if number is not None else given(console, loaded, texts)
        if token is not None:
            question = about_token(subject, question, token)
        others = [other for other, text in enumerate(own.texts) if text != question.texts[0]]
        rest = pick(own, others) if others else None
        found = candidates(decomposition, here, number or 0, search)
        located.append(search_slices(subject, decomposition, found, question, rest, known, search))
    return located


def own_row(prompt: str | None, own: Questions) -> int | None:
    """The row of a run's prompt, by its number or text; None for another text."""
    from spdcli.edits.selection import find_prompt

    if prompt is None:
        return None
    if prompt.isascii() and prompt.isdigit() and prompt not in own.texts:
        return find_prompt(own.texts, int(prompt))
    return own.texts.index(prompt) if prompt in own.texts else None


def given(console: Console, loaded: LoadedRun, texts: list[str]) -> tuple[Activity, Questions]:
    """The activity on a text that is none of the run's prompts, fed without its last token, and its question."""
    from spdcli.commands.change import warn_of_span
    from spdcli.edits.answer_changes import given_questions
    from spdcli.edits.selection import activity_of
    from spdcli.measures.texts import Texts

    warn_of_span(console, loaded.recipe, texts)
    begin_token = loaded.recipe.data is not None and loaded.recipe.data.begin_token
    question = given_questions(loaded.subject, texts, begin_token)
    unsearched = Texts(question.batch, texts, [], lambda query: [])
    return activity_of(loaded.subject, loaded.decomposition, unsearched), question


def render(found: dict[str, Any]) -> list[RenderableType]:
    """The slices by effect, and the pairs that do more than their sum."""
    limit = "" if found["limit"] is None else f", {found['statistic']} collateral at most {found['limit']:g}"
    title = f"{found['token']!r} of {found['prompt']!r}: {found['before']:.4f} before"
    title += f"; {found['candidates']} active slices{limit}"
    parts: list[RenderableType] = [title, table(found["slices"], lambda entry: entry["slice"], "slice", found)]
    if found["pairs"]:
        above = (
            f"{found['pairs_above_sum']} of {found['pairs_measured']} pairs do more than their sum in log-probability"
        )
        parts += [above, table(found["pairs"], lambda entry: "\n".join(entry["slices"]), "pair", found)]
    elif found["pairs_measured"]:
        parts.append(f"None of {found['pairs_measured']} pairs that may be told does more than the sum of its parts.")
    return parts


def table(entries: list[dict[str, Any]], name: Any, kind: str, found: dict[str, Any]) -> RenderableType:
    """A row an entry: what becomes of the answer, of the other prompt that moves most, and of the known facts."""
    from rich.table import Table

    made = Table(expand=True)
    facts = ["facts: median, mean, max"] if found["known_facts"] else []
    excess = ["excess"] if kind == "pair" else []
    for column in (kind, "after", "change", *excess, "KL", "others", *facts, "collateral"):
        made.add_column(column, justify="left" if column == kind else "right", overflow="fold")
    for entry in entries:
        most = f"{max(entry['others']):.1%}" if entry["others"] else ""
        collateral = "" if entry["collateral"] is None else f"{entry['collateral']:.2%}"
        made.add_row(
            name(entry),
            f"{entry['after']:.4f}",
            f"{entry['ratio'] - 1:+.1%}",
            *([f"{entry['excess']:+.2f}"] if excess else []),
            f"{entry['kl']:.3f}",
            most,
            *([", ".join(f"{value:.1%}" for value in entry["facts"].values())] if facts else []),
            collateral,
        )
    return made
