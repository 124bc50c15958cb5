"""`spd report`: where a run's facts are, beside baselines and controls, and what leaks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spdcli.commands.edit_options import FactsOption, read_facts
from spdcli.commands.evidence_tables import evidence_tables
from spdcli.commands.opening import opened
from spdcli.commands.options import (
    Device,
    Json,
    Noise,
    Quiet,
    RunPath,
    Seed,
    Sigma,
    Subjects,
    Verbose,
    Window,
    make_console,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.location.report import RunReport

REPORT, DATA, TEXT = "report", "report.json", "report.md"
Samples = Annotated[int, typer.Option("--samples", min=1, max=10**6, help="Draws of the noise of causal tracing.")]
Random = Annotated[int, typer.Option("--random", min=1, max=10**6, help="Random directions as a control.")]
MatrixOption = Annotated[
    str | None,
    typer.Option(
        "--matrix",
        "-m",
        help="The decomposed matrix that is edited.",
        show_default="the last one before the output of the first decomposed MLP",
    ),
]
Folder = Annotated[Path | None, typer.Option("--out", "-o", help="Where it goes.", show_default="RUN/report")]


def report(
    run: RunPath,
    subject: Subjects = None,
    matrix: MatrixOption = None,
    facts: FactsOption = None,
    noise: Noise = 3.0,
    sigma: Sigma = None,
    samples: Samples = 3,
    window: Window = 10,
    random: Random = 3,
    out: Folder = None,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Where is it? One table a fact: what cuts it, and what else that cuts.

    Causal tracing, zeroed MLP layers and the run's slices, beside edits that need
    no decomposition, random and singular directions, and, kept apart, an edit that
    was optimised for the effect. Then the fact in other words and in reverse.

    Writes report.md, report.json and figures (3, 4, 7 to 9) into RUN/report.
    """
    console = make_console(json, quiet, verbose)
    file = read_facts(facts, without=False)
    assert file is not None
    from spdcli.disk import write_json, write_text
    from spdcli.location.report import ReportSettings, report_facts
    from spdcli.location.report_markdown import markdown
    from spdcli.location.tracing import TraceSettings
    from spdcli.records import plain

    loaded = opened(console, run, device)
    seed, layers, recipe = loaded.seed_or(seed), len(loaded.subject.target.blocks), loaded.recipe
    settings = ReportSettings(TraceSettings(noise, sigma, samples, window, seed), random, matrix, seed)
    with console.progress() as tell:
        facts_of_run = report_facts(
            loaded.subject,
            loaded.decomposition,
            recipe.data,
            recipe.slices.ridge,
            file,
            subject or [],
            settings,
            tell,
        )
    said = {"noise": noise, "samples": samples, "window": window, "random": random, "seed": seed, "layers": layers}
    data = {"schema": "spd.report/1", "run": str(run), "settings": said, **plain(facts_of_run)}
    folder = out or run / REPORT
    figures = draw(facts_of_run, folder)
    data["figures"] = figures
    write_json(folder / DATA, data)
    text = markdown(str(run), facts_of_run, settings, layers, figures)
    write_text(folder / TEXT, text)
    console.show(data, *render(facts_of_run))
    console.result(folder / TEXT)


def draw(report: RunReport, folder: Path) -> list[Path]:
    """Figures 3, 4, 7 or 8, and 9 of a report."""
    from spdcli.figures.facts import save_names, save_slices, save_trace, save_zeroed

    folder.mkdir(parents=True, exist_ok=True)
    figures = save_zeroed(report.mlp_zeroed, folder)
    if any(fact.slices for fact in report.prompts):
        figures += save_slices(report, folder)
    for row, fact in enumerate(report.prompts):
        figures += save_trace(fact.trace, folder, f"trace-{row + 1}")
        if fact.slices:
            figures += save_names(fact, row, folder, f"names-{row + 1}")
    return figures


def render(report: RunReport) -> list[RenderableType]:
    """The short form: one table a fact, what was sought for the effect under a line, and what leaks."""
    from rich.table import Table

    from spdcli.location.report_markdown import cells, leak_heads, leak_rows

    parts: list[RenderableType] = []
    for fact in report.prompts:
        title = f"{fact.prompt}: where is it? P({fact.answer!r}) = {fact.before:.4f}"
        table = Table(title=title, caption="under the last line: sought for the effect, and no evidence of a place")
        table.add_column("edit, or intervention")
        for name in ("this fact", "other prompts", f"{report.facts.known} facts: median", "mean", "max"):
            table.add_column(name, justify="right")
        for row, following in zip(fact.rows, [*fact.rows[1:], None], strict=True):
            table.add_row(*cells(row), end_section=following is None or following.kind != row.kind)
        parts.append(table)
        if fact.related:
            leaks = Table(title="What leaks: in other words, and in reverse")
            for number, head in enumerate(leak_heads(fact)):
                leaks.add_column(head, justify="right" if number > 1 else "left")
            for cell in leak_rows(fact):
                leaks.add_row(*cell)
            parts.append(leaks)
    if report.evidence:
        parts += evidence_tables(report.evidence, [fact.prompt for fact in report.prompts])
    return parts
