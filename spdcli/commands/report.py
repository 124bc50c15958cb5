"""`spd report`: a run as one page; where its facts are, beside baselines and controls, and what leaks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spdcli.commands.edit_options import FactsOption, KeptText, TextTokens, read_facts
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
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.console import Console
    from spdcli.edits.facts_file import Facts
    from spdcli.location.report import ReportSettings, RunReport
    from spdcli.runs.loading import LoadedRun

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
NoFacts = Annotated[bool, typer.Option("--no-facts", help="Leave out the part about facts, which takes the most time.")]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Write the part about facts as report.md, too.")]
FigureNumbers = Annotated[
    list[int] | None,
    typer.Option(
        "--figure", metavar="N", help="Draw this figure of the paper alone; may be repeated.", show_default=False
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
    no_facts: NoFacts = False,
    text: KeptText = None,
    text_tokens: TextTokens = 100_000,
    markdown: AsMarkdown = False,
    figure: FigureNumbers = None,
    out: Folder = None,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """One page about a run: what was taken apart, how good it is, its slices, and where its facts are.

    RUN/report/report.html needs no network and nothing beside it. Of a language
    model it has a table a fact: what cuts it, and what else that cuts. Causal
    tracing, zeroed MLP layers and the run's slices, beside edits that need no
    decomposition, random and singular directions, and, kept apart, an edit that
    was optimised for the effect. Then the fact in other words and in reverse.
    With --text also what every edit does to so many tokens of ordinary text.

    report.json and the figures (3, 4, 7 to 9) lie beside it.
    """
    console = make_console(json, quiet, verbose)
    file = read_facts(facts, no_facts)
    from spdcli.location.report import ReportSettings
    from spdcli.location.tracing import TraceSettings
    from spdcli.page.assemble import write_page
    from spdcli.paper.table1 import PAPER_ACTIVE

    loaded = opened(console, run, device)
    seed, layers, recipe = loaded.seed_or(seed), len(loaded.subject.target.blocks), loaded.recipe
    settings = ReportSettings(TraceSettings(noise, sigma, samples, window, seed), random, matrix, seed)
    folder = out or run / REPORT
    if figure:
        draw_alone(console, loaded, figure, folder, file)
        return
    has_prompts = recipe.data is not None and recipe.data.prompts is not None
    asked = file if has_prompts or facts is not None else None
    if markdown and asked is None:
        raise UsageError("--markdown is about facts, and there are none here", "leave it out")
    beside = (text, text_tokens)
    about = None if asked is None else about_facts(console, loaded, asked, subject or [], settings, beside)
    with console.progress("the page") as tell:
        page, figures = write_page(loaded, folder, about, PAPER_ACTIVE, seed, tell)
    data = write_files(folder, run, about, settings, layers, figures, markdown)
    console.show(data, *([] if about is None else render(about)))
    console.result(page)


def about_facts(
    console: Console,
    run: LoadedRun,
    facts: Facts,
    subjects: list[str],
    settings: ReportSettings,
    text: tuple[str | None, int],
) -> RunReport:
    """The part of the page about facts, with what edits do to so many tokens of `text`, where there is one."""
    from spdcli.edits.text_changes import text_to_keep
    from spdcli.location.report import report_facts

    own, recipe, (source, tokens) = (run.subject, run.decomposition), run.recipe, text
    with console.progress("which facts the model knows") as tell:
        kept = None if source is None else text_to_keep(recipe, run.subject, source, tokens, tell)
        return report_facts(*own, recipe.data, recipe.slices.ridge, facts, subjects, settings, kept, tell)


def write_files(
    folder: Path,
    run: Path,
    about: RunReport | None,
    settings: ReportSettings,
    layers: int,
    figures: list[Path],
    markdown: bool,
) -> dict[str, Any]:
    """Write report.json, and with `markdown` the part about facts as report.md; what is in report.json."""
    from spdcli.disk import write_json, write_text
    from spdcli.location.report_markdown import markdown as in_markdown
    from spdcli.records import plain

    drawn = {"noise": settings.trace.noise, "samples": settings.trace.samples, "window": settings.trace.window}
    said = {**drawn, "random": settings.random, "seed": settings.seed, "layers": layers}
    facts = {"prompts": []} if about is None else plain(about)
    data = {"schema": "spd.report/1", "run": str(run), "settings": said, **facts, "figures": figures}
    write_json(folder / DATA, data)
    if markdown and about is not None:
        write_text(folder / TEXT, in_markdown(str(run), about, settings, layers, figures))
    return data


def draw_alone(console: Console, run: LoadedRun, numbers: list[int], folder: Path, facts: Facts | None) -> None:
    """Draw figures of the paper by their numbers, and say where they are."""
    from spdcli.page.paper_figures import draw_figure

    figures = []
    for number in numbers:
        with console.progress(f"Figure {number}") as tell:
            figures += draw_figure(run, number, folder, facts, tell)
    console.show({"schema": "spd.report/1", "run": str(run.directory), "prompts": [], "figures": figures})
    for path in figures:
        console.result(path)


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
