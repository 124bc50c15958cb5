"""`spd push`: a run for others, as a directory or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spdcli.commands.options import Force, Json, Quiet, RunPath, Verbose, make_console
from spdcli.errors import UsageError

Repository = Annotated[
    str | None,
    typer.Option("--repo", metavar="OWNER/NAME", help="Upload it to this repository of the hub.", show_default=False),
]
Folder = Annotated[Path | None, typer.Option("--out", "-o", help="Write it to this directory.", show_default=False)]
Private = Annotated[bool, typer.Option("--private", help="A repository that is made anew is private.")]


def push(
    run: RunPath,
    repo: Repository = None,
    out: Folder = None,
    private: Private = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Share a run: slices, importance functions, recipe and evaluation, with a model card.

    Others read it with spdcli.from_pretrained, or as any run directory. Weights are safetensors;
    of the target only a toy that was trained here is in it.
    """
    console = make_console(json, quiet, verbose)
    if (repo is None) == (out is None):
        raise UsageError("expected one of --repo OWNER/NAME and --out DIRECTORY")
    if private and repo is None:
        raise UsageError("--private is for --repo")
    from spdcli.runs import sharing
    from spdcli.runs.loading import load

    loaded = load(run, "cpu")
    place = sharing.write_shared(loaded, out, force) if out else sharing.push(loaded, str(repo), private)
    console.show({"schema": "spd.push/1", "run": run, "place": str(place)})
    console.result(place)
