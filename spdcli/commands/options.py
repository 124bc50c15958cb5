"""The options that commands share, and the console that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spdcli.commands import completion
from spdcli.console import Console
from spdcli.errors import UsageError
from spdcli.measures.evidence_choices import ADVERSARIES
from spdcli.recipe.choices import DEVICES

if TYPE_CHECKING:
    DeviceName = str
    AdversaryName = str
else:
    DeviceName = Literal[tuple(DEVICES)]
    AdversaryName = Literal[tuple(ADVERSARIES)]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result's line and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more about what is going on.")]
Device = Annotated[
    DeviceName | None,
    typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.", show_default=False),
]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, max=2**62, help="Seed of every random choice.", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one setting of the recipe, as in losses.minimality=0.1; may be given again.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The run directory to write.")]
RunPath = Annotated[
    Path,
    typer.Argument(help="A run directory, as spd decompose writes it.", metavar="RUN", autocompletion=completion.runs),
]
Threshold = Annotated[
    float, typer.Option("--threshold", min=0.0, max=1.0, help="A slice is active where its importance is above this.")
]
AdversaryOption = Annotated[
    AdversaryName,
    typer.Option(
        "--adversary",
        help="How hard masks are sought that break it. " + "; ".join(f"{k}: {v.about}" for k, v in ADVERSARIES.items()),
    ),
]
Starts = Annotated[
    int, typer.Option("--starts", min=1, max=10**6, help="Random starts of that search, beside two corners.")
]
MatrixPattern = Annotated[
    list[str] | None,
    typer.Option(
        "--matrix",
        "-m",
        help="Only matrices like this; * and ? are wild; may be repeated.",
        autocompletion=completion.matrices,
        show_default=False,
    ),
]
Matrices = Annotated[list[str] | None, typer.Option("--matrices", hidden=True)]  # as `--matrix` was called, too
Force = Annotated[bool, typer.Option("--force", help="Replace what is already there.")]
Nproc = Annotated[
    int, typer.Option("--nproc", min=1, max=1024, help="Processes of this machine that make the run together.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that is already there.")]
RecipeName = Annotated[
    str,
    typer.Argument(
        help="A recipe file, or a shipped recipe's name.", metavar="RECIPE", autocompletion=completion.recipes
    ),
]
Subjects = Annotated[
    list[str] | None,
    typer.Option(
        "--subject",
        help="The words to corrupt; may be repeated, for prompts about others.",
        show_default="the subjects that the facts name",
    ),
]
Noise = Annotated[float, typer.Option("--noise", min=0.0, help="Noise, in standard deviations of the embeddings.")]
Sigma = Annotated[
    float | None,
    typer.Option("--sigma", min=0.0, help="One of them, instead of the embedding matrix's.", show_default=False),
]
Window = Annotated[
    int, typer.Option("--window", min=1, max=10**6, help="Blocks whose MLPs (or attention) are restored at once.")
]


def make_console(json: bool = False, quiet: bool = False, verbose: bool = False) -> Console:
    """The console that `--json`, `-q` and `-v` ask for; UsageError when they contradict each other."""
    if quiet and verbose:
        raise UsageError("--quiet and --verbose contradict each other", "give one of the two")
    return Console(json=json, quiet=quiet, verbose=verbose)
