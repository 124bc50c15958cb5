"""`spd inspect`: the slices that are active at a token."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from spdcli.commands import completion
from spdcli.commands.opening import opened
from spdcli.commands.options import (
    Device,
    Json,
    MatrixPattern,
    Quiet,
    RunPath,
    Seed,
    Threshold,
    Verbose,
    make_console,
)
from spdcli.commands.prompt_option import prompt_option, read_prompts
from spdcli.console.fitting import Cut
from spdcli.records import plain

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import RenderableType

    from spdcli.console import Console
    from spdcli.measures.harvest_files import SliceInText
    from spdcli.measures.inspection import Heat, Inspection, Occurrence, SliceLabels

Token = Annotated[
    str | None,
    typer.Option("--token", "-t", help="A token's text or #id; every position if not given.", show_default=False),
]
Prompt = Annotated[
    list[str] | None, prompt_option("Look at this instead of all of the run's prompts; a text is fed whole")
]
Slice = Annotated[
    list[str] | None,
    typer.Option(
        "--slice",
        help="Show what this slice does over text, as spd harvest saw it.",
        autocompletion=completion.slices,
        show_default=False,
    ),
]
Top = Annotated[int, typer.Option("--top", min=1, max=10**6, help="Slices to show at each place.")]
Places = Annotated[int, typer.Option("--places", min=1, max=10**6, help="Places to show, the first ones.")]
Labels = Annotated[int, typer.Option("--labels", min=0, max=10**6, help="Tokens to label a slice with.")]
SCHEMA = "spd.inspect/2"
UNIQUE_MARK = "* unique: active in this prompt and in no other"
SHADES = "▁▂▃▄▅▆▇█"
LIGHT = 0.75  # of the largest importance, above which the ground is light enough for black


def inspect(
    run: RunPath,
    token: Token = None,
    prompt: Prompt = None,
    slice_: Slice = None,
    matrix: MatrixPattern = None,
    top: Top = 20,
    places: Places = 20,
    labels: Labels = 5,
    threshold: Threshold = 0.0,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the slices that are active at a token: importance, activation, what they read and promote.

    A slice marked * is unique: active in this prompt and in no other. With --slice: what that slice does
    over the text that spd harvest read.
    """
    console = make_console(json, quiet, verbose)
    if slice_:
        show_slices(console, run, slice_, labels, device)
        return
    from spdcli.measures.inspection import Query, inspect_texts

    prompts = read_prompts(prompt)
    loaded = opened(console, run, device)
    query = Query(token, matrix or ["*"], top, labels, threshold, places)
    begin, seed = loaded.begin_token, loaded.seed_or(seed)
    with console.progress("looking at every token") as report:
        inspection = inspect_texts(loaded.subject, loaded.decomposition, query, prompts, begin, seed, report)
    console.show({"schema": SCHEMA, "run": run} | plain(inspection), *render(inspection))
    if quiet:
        for address in dict.fromkeys(one.slice for place in inspection.occurrences for one in place.slices):
            console.result(address)


def show_slices(console: Console, run: Path, addresses: Sequence[str], labels: int, device: str | None) -> None:
    """What each slice does over text, with the tokens that it promotes and reads."""
    from spdcli.measures.harvest_files import described, load_harvest, slice_number
    from spdcli.measures.inspection import labels_of
    from spdcli.runs.loading import load

    harvest = load_harvest(run)
    numbers = [slice_number(harvest, address) for address in addresses]
    loaded = load(run, device)
    found = [described(harvest, number, loaded.subject.token_text) for number in numbers]
    named = labels_of(loaded.subject, loaded.decomposition, [one.slice for one in found], labels)
    rows = [plain(one) | plain(own) for one, own in zip(found, named, strict=True)]
    data = {"schema": SCHEMA, "run": run, "token": None, "occurrences": [], "heat": [], "slices": rows}
    console.show(data, *(slice_table(one, own) for one, own in zip(found, named, strict=True)))


def slice_table(one: SliceInText, labels: SliceLabels) -> RenderableType:
    """What a slice prefers, what it is active with, and its strongest contexts with the token that counts in «»."""
    from rich.table import Table

    title = f"{one.slice}: active at {one.density:.2%} of tokens, mean importance {one.importance:.2g}"
    table = Table(title=title, show_header=False, expand=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1)
    facts = {
        "input tokens": [repr(token.token) for token in one.input_tokens],
        "next tokens": [repr(token.token) for token in one.next_tokens],
        "promotes": [repr(token) for token in labels.promotes],
        "reads": [repr(token) for token in labels.reads],
        "fires with": [f"{other.slice} ({other.overlap:.0%})" for other in one.fires_with],
    }
    for name, words in facts.items():
        table.add_row(name, "  ".join(words))
    table.add_section()
    for context in one.examples:
        table.add_row(f"{context.importance:.2f}", " ".join(context.marked.split()))
    return table


def render(inspection: Inspection) -> list[RenderableType]:
    """How many places are shown, where not all are; a heat strip a prompt, and a table a place with active slices."""
    shown = len(inspection.occurrences)
    parts: list[RenderableType] = []
    if inspection.places and shown < inspection.places:
        parts.append(f"The first {shown} of {inspection.places} places; --places N shows more, --token one token.")
    parts += [heat_strip(heat) for heat in inspection.heat]
    for _, together in groupby(inspection.occurrences, lambda one: one.number if not one.slices else one):
        places = list(together)
        parts.append(occurrence_table(places[0]) if places[0].slices else nothing_at(places))
    return parts


def nothing_at(places: Sequence[Occurrence]) -> str:
    """A line for neighbouring places of one prompt where no slice is active."""
    first, last = places[0], places[-1]
    where = f"position {first.position}" if first is last else f"positions {first.position} to {last.position}"
    return f"No slice is active at {where} of prompt {first.number}: {' '.join(repr(one.token) for one in places)}"


def heat_strip(heat: Heat) -> RenderableType:
    """The tokens of a prompt, each with a bar and a shade as high as its sum of importances, and that sum."""
    from rich.text import Text

    most = max(heat.importance) or 1.0
    strip = Text(f"importance over prompt {heat.number}:")
    for token, value in zip(heat.tokens, heat.importance, strict=True):
        share = value / most
        red = round(40 + 200 * share)
        ink = "#000000" if share > LIGHT else "#ffffff"  # by name they are what a terminal's theme makes of them
        bar = SHADES[min(len(SHADES) - 1, int(share * len(SHADES)))] if value else "·"
        strip.append(" ")
        strip.append(f"{token.strip() or repr(token)}{bar}", style=f"{ink} on rgb({red},{red // 2 + 20},40)")
        strip.append(f"{value:.1f}" if value else "", style="dim")
    return strip


def occurrence_table(occurrence: Occurrence) -> RenderableType:
    """One row a slice, each on one line; labels that do not fit are cut."""
    from rich.table import Table

    title = f"{occurrence.token!r} at position {occurrence.position} of prompt {occurrence.number}"
    shown = len(occurrence.slices)
    counts = f"{occurrence.active} active slices" + (f", the first {shown} shown" if shown < occurrence.active else "")
    caption = UNIQUE_MARK if any(entry.unique for entry in occurrence.slices) else None
    table = Table(title=f"{title}: {counts}", caption=caption, expand=True)
    table.add_column("slice", no_wrap=True, min_width=24)
    table.add_column("*")
    table.add_column("importance", justify="right")
    table.add_column("activation", justify="right")
    table.add_column("promotes", ratio=1, no_wrap=True)
    table.add_column("reads", ratio=1, no_wrap=True)
    for entry in occurrence.slices:
        table.add_row(
            entry.slice,
            "*" if entry.unique else "",
            f"{entry.importance:.3f}",
            f"{entry.activation:.2f}",
            Cut([repr(token) for token in entry.promotes]),
            Cut([repr(token) for token in entry.reads]),
        )
    return table
