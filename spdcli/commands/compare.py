"""`spd compare`: what a setting of a recipe costs and buys, at equal steps and at equal time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spdcli.commands.evidence_tables import grade_of
from spdcli.commands.options import Device, Force, Json, Quiet, RecipeName, Seed, Set, Verbose, make_console
from spdcli.engine.tables import GRADES, LOSSES, losses_where
from spdcli.measures.evidence_choices import SIZE, STEPS

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.comparison import SettingRun

REPORT = "compare.json"
WORST = (
    f"corner: the worst of delta 0, ½, 1 and slices all on; PGD: {GRADES['adversarial'].label}, "
    f"{STEPS} steps of {SIZE:g} on masks that all positions share"
)
SHOWN = sorted(losses_where(lambda loss: loss.compared), key=lambda name: not LOSSES[name].in_grid)

With = Annotated[
    list[str],
    typer.Option(
        "--with",
        metavar="KEY=VALUE",
        help="A setting to compare; may be given again. Several that belong together have ; between them.",
        show_default=False,
    ),
]
EqualTime = Annotated[
    bool,
    typer.Option("--equal-time/--equal-steps", help="Whether a setting that makes steps faster gets a second run."),
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="The directory for the runs and the report.")]
SequencesOption = Annotated[
    int, typer.Option("--sequences", min=2, max=10**6, help="Fresh toy sequences to measure each run on.")
]


def compare(
    recipe: RecipeName,
    with_: With,
    out: OutFolder = Path("compare"),
    sequences: SequencesOption = 2048,
    equal_time: EqualTime = True,
    set_: Set = None,
    device: Device = None,
    seed: Seed = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Decompose by a recipe as it is and with each setting changed, at equal steps and at equal time.

    A setting that makes steps faster gets a second run of as many steps as fit the
    time that the recipe as it is took, unless --equal-steps says otherwise. What is
    finished is reused. Compare on a machine that does nothing else: seconds are
    measured.
    """
    console = make_console(json, quiet, verbose)
    from spdcli.comparison import compare_settings
    from spdcli.disk import write_json
    from spdcli.records import plain

    settings = list(set_ or [])
    with console.progress() as report:
        runs = compare_settings(recipe, with_, out, settings, sequences, seed, device, force, report, equal_time)
    rows = [{"with": run.setting, **plain(run)} for run in runs]
    data = {"schema": "spd.compare/1", "recipe": recipe, "settings": settings, "rows": rows}
    write_json(out / REPORT, data)
    console.show(data, table(runs), *parts_tables(runs))
    console.result(out)


def table(runs: Sequence[SettingRun]) -> Table:
    """One row a run; L0 is active slices a position, then those of importance above 0.1, then all that are active
    somewhere."""
    from rich.table import Table

    graded = "; ".join(f"{name.replace('_', ' ')}: {grade_of(name)}" for name in SHOWN if grade_of(name))
    rows = Table(title="At equal steps, then at equal time", caption=f"{graded}; {WORST}")
    rows.add_column("", overflow="fold", ratio=1)
    for heading in ("steps", "seconds", "s/step", "L0", "> 0.1", "active"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for name in SHOWN:
        rows.add_column(name.replace("_", " "), justify="right", width=max(7, *map(len, name.split("_"))))
    for heading in ("corner", "PGD"):
        rows.add_column(heading, justify="right", width=7)
    for run in runs:
        rows.add_row(
            run.setting,
            str(run.steps),
            f"{run.seconds:.0f}",
            f"{run.seconds / run.steps:.3g}",
            f"{run.l0:.2f}",
            f"{run.l0_above_tenth:.2f}",
            str(run.total_active),
            *(f"{run.metrics[name]:.1e}" for name in SHOWN),
            f"{run.evidence.worst_corner:.1e}" if run.evidence else "",
            f"{run.evidence.pgd_shared.kl:.1e}" if run.evidence and run.evidence.pgd_shared else "",
        )
    return rows


def parts_tables(runs: Sequence[SettingRun]) -> list[Table]:
    """One row a run and matrix of a toy of sparse features: what is found of its known parts; none of other targets."""
    from rich.table import Table

    from spdcli.measures.feature_evaluation import LIVE

    if not runs[0].live:
        return []
    rows = Table(title="Known parts", caption=f"live: slices of importance above {LIVE:g} on some feature alone")
    rows.add_column("", overflow="fold", ratio=1)
    for heading in ("matrix", "max cosine", "L2 ratio", "live"):
        rows.add_column(heading, justify="left" if heading == "matrix" else "right", no_wrap=True)
    for run in runs:
        for matrix, live in (run.live or {}).items():
            found = run.parts.get(matrix) if run.parts else None
            measures = (found.mean_max_cosine, found.l2_ratio) if found else (None, None)
            shown = ("" if value is None else f"{value:.4f}" for value in measures)
            rows.add_row(run.setting, matrix, *shown, str(live))
    return [rows]
