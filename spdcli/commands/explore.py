"""`spd explore`: a text's slices on a screen, to switch off and see what the model says then."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from spdcli.commands import completion
from spdcli.commands.opening import opened
from spdcli.commands.options import Device, Json, Quiet, RunPath, Seed, Threshold, Verbose, make_console
from spdcli.commands.prompt_option import prompt_option, read_prompt
from spdcli.errors import SpdError, UsageError

Prompt = Annotated[str, prompt_option("Begin with this; a text is fed whole", True, several=False)]
Off = Annotated[
    list[str] | None,
    typer.Option(
        "--slice",
        "-s",
        help="MATRIX:INDEX that is off at first; may be repeated.",
        show_default=False,
        autocompletion=completion.slices,
    ),
]
Script = Annotated[
    Path, typer.Option("--script", help="The edit script that what is off is added to, unless another is typed.")
]


def explore(
    run: RunPath,
    prompt: Prompt = "1",
    slice: Off = None,
    script: Script = Path("edits.toml"),
    threshold: Threshold = 0.0,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Look at a text slice by slice on the terminal, switch slices off, and see what the model says then.

    Arrow keys move on a map of importance, tokens by matrices, and below it are
    the slices of the cell with what they read and promote. Tab goes there, space
    switches a slice off or on, m changes what off means, t takes another text,
    and w adds what is off to an edit script. With --json it prints the map.

    Of a toy of sparse features the map has inputs by matrices, and what changes
    are the outputs for the input that the cursor is on.
    """
    console = make_console(json, quiet, verbose)
    if not json:
        require_screen()
    which = read_prompt(prompt)

    loaded = opened(console, run, device)
    from spdcli.edits.suppression import find_slices
    from spdcli.explorer.features import FeatureExploration, exploration_of
    from spdcli.records import plain

    off = [str(address) for address in find_slices(loaded.decomposition, slice or [])]
    exploration = exploration_of(loaded, threshold, seed=seed)
    view = exploration.chosen(which)
    if json:
        if isinstance(exploration, FeatureExploration):
            data = {"schema": "spd.explore.features/1", "run": run, **plain(exploration.feature_map(view, off))}
        else:
            data = {"schema": "spd.explore/2", "run": run, **plain(exploration.text_map(view, off))}
        console.show(data)
        return
    from spdcli.explorer.app import Explorer

    Explorer(exploration, view, script, off).run()


def require_screen() -> None:
    """SpdError where Textual is not installed, UsageError where there is no terminal."""
    if find_spec("textual") is None:
        raise SpdError("spd explore needs Textual, which is not installed", "pip install 'spd-cli[explore]'")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("spd explore needs a terminal", "spd inspect RUN tells the same in tables; --json the map")
