"""`spd report`: where a run's facts are, beside baselines and controls, and what leaks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spdcli.commands.change import FactsOption, read_facts
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

REPORT, DATA, TEXT = "report", "report.json", "report.md"
Samples = Annotated[int, typer.Option("--samples", min=1, help="Draws of the noise of causal tracing.")]
Random = Annotated[int, typer.Option("--random", min=1, help="Random directions as a control.")]
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
    from spdcli.files import write_atomically, write_json
    from spdcli.location.report import ReportSettings, make_report
    from spdcli.location.report_markdown import markdown
    from spdcli.location.tracing import TraceSettings
    from spdcli.runs.loading import load

    loaded = load(run, device)
    console.debug(str(loaded))
    chosen = loaded.recipe.seed if seed is None else seed
    settings = ReportSettings(TraceSettings(noise, sigma, samples, window, chosen), random, matrix, chosen)
    with console.live() as line:
        steps = iter(range(1, 1000))
        total = 4 + 2 * len(loaded.recipe.data.prompts if loaded.recipe.data else [])
        found = make_report(loaded, file, subject or [], settings, lambda text: line.update(text, next(steps), total))
    told = {"noise": noise, "samples": samples, "window": window, "random": random, "seed": chosen}
    told["layers"] = len(loaded.subject.target.blocks)
    data = {"schema": "spd.report/1", "run": str(run), "settings": told, **found}
    folder = out or run / REPORT
    figures = draw(data, folder)
    data["figures"] = figures
    write_json(folder / DATA, data)
    write_atomically(folder / TEXT, lambda beside: beside.write_text(markdown(data, figures), encoding="utf-8"))
    console.show(data, *render(data))
    console.result(folder / TEXT)


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """Figures 3, 4, 7 or 8, and 9 of a report."""
    from spdcli.figures.facts import save_names, save_slices, save_trace, save_zeroed
    from spdcli.records import plain

    folder.mkdir(parents=True, exist_ok=True)
    drawn = save_zeroed(data["mlp_zeroed"], folder)
    if any(entry["slices"] for entry in data["prompts"]):
        drawn += save_slices(data, folder)
    for row, entry in enumerate(data["prompts"]):
        drawn += save_trace(plain(entry["trace"]), folder, f"trace-{row + 1}")
        if entry["slices"]:
            drawn += save_names(entry, row, folder, f"names-{row + 1}")
    return drawn


def render(data: dict[str, Any]) -> list[RenderableType]:
    """The short form: one table a fact, what was sought for the effect under a line, and what leaks."""
    from rich.table import Table

    from spdcli.location.report_markdown import cells, leak_heads, leak_rows

    parts: list[RenderableType] = []
    for entry in data["prompts"]:
        title = f"{entry['prompt']}: where is it? P({entry['answer']!r}) = {entry['before']:.4f}"
        known = data["facts"]["known"]
        found = Table(title=title, caption="under the last line: sought for the effect, and no evidence of a place")
        found.add_column("edit, or intervention")
        for name in ("this fact", "other prompts", f"{known} facts: median", "mean", "max"):
            found.add_column(name, justify="right")
        rows = entry["rows"]
        for row, following in zip(rows, [*rows[1:], None], strict=True):
            last = following is None or following["kind"] != row["kind"]
            found.add_row(*cells(row), end_section=last)
        parts.append(found)
        if entry["related"]:
            leaks = Table(title="What leaks: in other words, and in reverse")
            for number, head in enumerate(leak_heads(entry)):
                leaks.add_column(head, justify="right" if number > 1 else "left")
            for cell in leak_rows(entry):
                leaks.add_row(*cell)
            parts.append(leaks)
    return parts
