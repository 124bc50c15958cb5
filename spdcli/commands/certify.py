"""`spd certify`: everything that a sceptic asks of a run, held against the bounds of its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spdcli.commands.edit_options import FactsOption, read_facts
from spdcli.commands.evidence_tables import MEANING
from spdcli.commands.opening import opened
from spdcli.commands.options import (
    AdversaryOption,
    Device,
    Json,
    Quiet,
    RunPath,
    Seed,
    Set,
    Starts,
    Threshold,
    Verbose,
    make_console,
)
from spdcli.engine.tables import GRADES
from spdcli.errors import SpdError, UsageError
from spdcli.measures.evidence_choices import STARTS

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.certification.certificate import Certificate, CertificateRow
    from spdcli.recipe.reading import LoadedRecipe

Against = Annotated[
    list[Path] | None,
    typer.Option(
        "--against",
        metavar="RUN",
        help="Another run of the same target, whose slices should be the same; may be given again.",
        show_default=False,
    ),
]
ScriptFile = Annotated[
    Path | None,
    typer.Option("--script", help="An edit script, whose expectations are bounds too.", show_default=False),
]
BoundsOf = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="RECIPE", help="Whose [certify] it is held against.", show_default="the run's own recipe"
    ),
]
Sequences = Annotated[int, typer.Option("--sequences", min=2, max=10**6, help="Fresh toy sequences to measure on.")]


def certify(
    run: RunPath,
    against: Against = None,
    script: ScriptFile = None,
    recipe: BoundsOf = None,
    set_: Set = None,
    facts: FactsOption = None,
    sequences: Sequences = 8192,
    threshold: Threshold = 0.0,
    adversary: AdversaryOption = "curve",
    starts: Starts = STARTS,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Everything a sceptic asks of a run in one report, with what was spent to find it.

    How many slices are active; how far masked slices are from the target under importance
    masks, random masks, in the corners and under masks that a search found; what no slice
    holds; held-out text; whether other seeds find the same slices; what edits do beside.

    The section [certify] of the run's recipe says what must hold. Exit code 1 when a bound
    fails, each with its line. Writes RUN/certificate.json.
    """
    console = make_console(json, quiet, verbose)
    require_bounds(set_ or [])
    from spdcli.certification.certify import Certifying
    from spdcli.certification.certify import certify as measure
    from spdcli.edits.script import load_script
    from spdcli.measures.evidence_choices import MaskSearch
    from spdcli.recipe.reading import load_recipe
    from spdcli.records import plain
    from spdcli.runs.directory import CERTIFICATE, RECIPE, RunDirectory
    from spdcli.runs.results import write_result

    directory = RunDirectory.open(run)
    held = load_recipe(recipe or str(directory / RECIPE), set_ or [])
    bounds = {} if held.recipe.certify is None else held.recipe.certify.bounds
    read = None if script is None else load_script(script)
    beside = read_facts(facts, without=False) if read is not None and read[0].asks_facts else None
    loaded, others = opened(console, run, device), [opened(console, other, device) for other in against or ()]
    settings = Certifying(sequences, threshold, MaskSearch(adversary, starts), loaded.seed_or(seed))
    with console.progress() as report:
        certificate = measure(loaded, bounds, settings, others, read, beside, report)
    data = {"schema": "spd.certify/1", "run": str(run), **plain(settings), **plain(certificate)}
    data = write_result(loaded.home, loaded.decomposition, CERTIFICATE, data)
    console.show(data, table(certificate), MEANING)
    if not bounds:
        console.note("no bounds: the recipe has no [certify]; --recipe takes another's, --set certify.NAME=VALUE one")
    console.result(run / CERTIFICATE)
    if not certificate.passed:
        raise SpdError("\n".join(failure(row, held, bounds) for row in certificate.failures))


def require_bounds(settings: list[str]) -> None:
    """UsageError for a `--set` of anything but a bound."""
    for setting in settings:
        if not setting.strip().startswith("certify."):
            raise UsageError(f"--set {setting}: the run is there already", "only bounds can be set: certify.NAME=VALUE")


def table(certificate: Certificate) -> Table:
    """A row a number: what it is worth, its bound, whether that holds, and what was spent."""
    from rich.table import Table

    shown = Table(title=f"Certificate: {verdict(certificate)}", expand=True)
    for heading in ("", "evidence"):
        shown.add_column(heading)
    for heading in ("value", "bound", "holds"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("found on, or with", ratio=1)
    for row in certificate.rows:
        graded = GRADES[row.grade].label if row.grade else ""
        holds = {None: "", True: "yes", False: "NO"}[row.passed]
        value = "–" if row.value is None else f"{row.value:.4g}"
        shown.add_row(row.name, graded, value, row.bound or "", holds, row.budget)
    return shown


def verdict(certificate: Certificate) -> str:
    """How many bounds hold, in words."""
    bounded = sum(row.passed is not None for row in certificate.rows)
    return f"{bounded - len(certificate.failures)} of {bounded} bounds hold" if bounded else "no bounds"


def failure(row: CertificateRow, recipe: LoadedRecipe, bounds: dict[str, float]) -> str:
    """One line: where the bound stands, what it is, and what was measured."""
    value = "was not measured" if row.value is None else f"is {row.value:.4g} ({row.budget})"
    if row.name not in bounds:
        return f"{row.name} {value}, expected {row.bound}"
    place = recipe.source.problem([("certify", row.name)], f"[certify] {row.name} {value}, expected {row.bound}")
    return str(place)
