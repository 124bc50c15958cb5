"""`spd search`: slices by the text of their contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from spdcli.commands.options import Json, Quiet, RunPath, Verbose, make_console
from spdcli.records import plain

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.measures.slice_search import Match

Words = Annotated[str, typer.Argument(help="Words of the contexts, whatever their case.", metavar="TEXT")]
Top = Annotated[int, typer.Option("--top", min=1, max=10**6, help="Slices to show.")]


def search(
    run: RunPath, words: Words, top: Top = 20, json: Json = False, quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Find slices by the text of the contexts that `spd harvest` kept of them.

    Those come first that are active at these words themselves, not only near them.
    """
    console = make_console(json, quiet, verbose)
    from spdcli.errors import SpdError
    from spdcli.measures.harvest_files import every_slice, load_harvest
    from spdcli.measures.slice_search import matching_slices
    from spdcli.runs.models import token_text_of

    matches = matching_slices(every_slice(load_harvest(run), token_text_of(run)), words, top)
    if not matches:
        raise SpdError(f"no slice has a context with {words!r}", f"spd harvest {run} --tokens N reads more text")
    console.show({"schema": "spd.search/1", "run": run, "text": words, "matches": plain(matches)}, table(matches))
    if quiet:
        for match in matches:
            console.result(match.slice)


def table(matches: list[Match]) -> Table:
    """A row a slice, with its first context."""
    from rich.table import Table

    table = Table(expand=True)
    table.add_column("slice", no_wrap=True, min_width=24)
    table.add_column("at the words", justify="right")
    table.add_column("contexts", justify="right")
    table.add_column("density", justify="right")
    table.add_column("", ratio=1)
    for match in matches:
        text = " ".join(match.examples[0].marked.split())
        table.add_row(match.slice, str(match.at_words), str(match.contexts), f"{match.density:.2%}", text)
    return table
