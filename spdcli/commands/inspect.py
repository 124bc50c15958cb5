"""`spd inspect`: the slices that are active at a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from spdcli.commands import completion
from spdcli.commands.options import Device, Json, Quiet, RunPath, Seed, Threshold, Verbose, make_console
from spdcli.records import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.measures.inspection import Heat, Inspection, Occurrence

Token = Annotated[
    str | None,
    typer.Option("--token", "-t", help="A token's text or #id; every position if not given.", show_default=False),
]
Prompt = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="Look at this text instead of the run's.", show_default=False)
]
MatrixPattern = Annotated[
    list[str] | None,
    typer.Option(
        "--matrix",
        "-m",
        help="Only matrices like this; * and ? are wild.",
        autocompletion=completion.matrices,
        show_default=False,
    ),
]
Top = Annotated[int, typer.Option("--top", min=1, help="Slices to show at each place.")]
Labels = Annotated[int, typer.Option("--labels", min=0, help="Tokens to label a slice with.")]
UNIQUE_MARK = "* unique: active in this prompt and in no other"
SHADES = "▁▂▃▄▅▆▇█"


def inspect(
    run: RunPath,
    token: Token = None,
    prompt: Prompt = None,
    matrix: MatrixPattern = None,
    top: Top = 20,
    labels: Labels = 5,
    threshold: Threshold = 0.0,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the slices that are active at a token: importance, activation, what they read and promote.

    A slice marked * is unique: active in this prompt and in no other.
    """
    console = make_console(json, quiet, verbose)
    from spdcli.measures.inspection import Query, inspect_texts
    from spdcli.runs.loading import load

    loaded = load(run, device)
    console.debug(str(loaded))
    query = Query(token, matrix or ["*"], top, labels, threshold)
    begin, seed = loaded.begin_token, loaded.seed_or(seed)
    with console.progress() as report:
        inspection = inspect_texts(loaded.subject, loaded.decomposition, query, prompt or [], begin, seed, report)
    console.show({"schema": "spd.inspect/1", "run": run} | plain(inspection), *render(inspection))
    if quiet:
        for address in dict.fromkeys(one.slice for place in inspection.occurrences for one in place.slices):
            console.result(address)


def render(inspection: Inspection) -> list[RenderableType]:
    """A heat strip a prompt, and a table an occurrence."""
    parts: list[RenderableType] = [heat_strip(heat) for heat in inspection.heat]
    return parts + [occurrence_table(occurrence) for occurrence in inspection.occurrences]


def heat_strip(heat: Heat) -> RenderableType:
    """The tokens of a prompt, each with a bar and a shade as high as its sum of importances, and that sum."""
    from rich.text import Text

    most = max(heat.importance) or 1.0
    strip = Text(f"importance over prompt {heat.prompt + 1}:")
    for token, value in zip(heat.tokens, heat.importance, strict=True):
        share = value / most
        red = round(40 + 200 * share)
        ink = "black" if share > 0.5 else "white"
        bar = SHADES[min(len(SHADES) - 1, int(share * len(SHADES)))] if value else "·"
        strip.append(" ")
        strip.append(f"{token.strip() or repr(token)}{bar}", style=f"{ink} on rgb({red},{red // 2 + 20},40)")
        strip.append(f"{value:.1f}" if value else "", style="dim")
    return strip


def occurrence_table(occurrence: Occurrence) -> RenderableType:
    """One row a slice, each on one line; labels that do not fit are cut."""
    from rich.table import Table

    title = f"{occurrence.token!r} at position {occurrence.position} of prompt {occurrence.prompt + 1}"
    shown = len(occurrence.slices)
    counts = f"{occurrence.active} active slices" + (f", the first {shown} shown" if shown < occurrence.active else "")
    caption = UNIQUE_MARK if any(entry.unique for entry in occurrence.slices) else None
    table = Table(title=f"{title}: {counts}", caption=caption, expand=True)
    table.add_column("slice", no_wrap=True, min_width=24)
    table.add_column("*")
    table.add_column("importance", justify="right")
    table.add_column("activation", justify="right")
    table.add_column("promotes", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("reads", ratio=1, no_wrap=True, overflow="ellipsis")
    for entry in occurrence.slices:
        table.add_row(
            entry.slice,
            "*" if entry.unique else "",
            f"{entry.importance:.3f}",
            f"{entry.activation:.2f}",
            " ".join(repr(token) for token in entry.promotes),
            " ".join(repr(token) for token in entry.reads),
        )
    if not occurrence.slices:
        table.add_row("no slice is active here")
    return table
