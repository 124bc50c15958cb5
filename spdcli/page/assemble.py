"""The page of a run put together: measured where no `spd eval` was, its figures drawn, its slices looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spdcli.disk import write_text
from spdcli.explorer.exploration import Exploration
from spdcli.figures.attention import save_patterns
from spdcli.figures.curves import save_training_curve
from spdcli.figures.facts import save_report
from spdcli.figures.training import save_decomposition_curves
from spdcli.location.report import RunReport
from spdcli.measures.evaluation import evaluate
from spdcli.measures.evidence_choices import NO_SEARCH
from spdcli.measures.target_and_masked import language_patterns, patterns_of
from spdcli.page.content import Page, Picture, about, active_slices, commands, evidence, metrics, token_maps
from spdcli.page.fact_sections import all_facts_pictures, fact_sections, kinds_of_rows
from spdcli.page.features import feature_maps, feature_picture, found_parts, part_tables
from spdcli.page.render import html
from spdcli.page.slices import slice_entries
from spdcli.progress import Progress, Report, silent
from spdcli.records import plain
from spdcli.runs.directory import EVAL, METRICS, TOY, RunDirectory
from spdcli.runs.loading import LoadedRun
from spdcli.runs.results import kept_result

PAGE = "report.html"
SEQUENCES = 512  # fresh ones of a toy that is measured for the page
LONGEST_PATTERN = 64  # tokens of a text whose attention is drawn
MOST_BLOCKS = 12  # whose attention is drawn, from the first on
STAGES = 4


def write_page(
    run: LoadedRun,
    folder: Path,
    facts: RunReport | None = None,
    paper: Mapping[str, Sequence[float]] | None = None,
    seed: int | None = None,
    report: Report = silent,
) -> tuple[Path, list[Path]]:
    """Write a run's page and its figures into `folder`; gives the page, and the figures (see `run_page`)."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = [] if facts is None else save_report(facts, folder)
    page = run_page(run, folder, facts, figures, paper, seed, report)
    write_text(folder / PAGE, html(page))
    pictures = (*page.curves, *page.patterns, *page.part_pictures)
    drawn = [one.file.with_suffix(kind) for one in pictures for kind in (".png", ".svg")]
    return folder / PAGE, [*figures, *drawn]


def run_page(
    run: LoadedRun,
    folder: Path,
    facts: RunReport | None = None,
    fact_figures: Sequence[Path] = (),
    paper: Mapping[str, Sequence[float]] | None = None,
    seed: int | None = None,
    report: Report = silent,
) -> Page:
    """The page of a run, whose further figures are drawn into `folder`.

    `facts` is what `spd report` says of a language model's facts, with the figures of that; `paper` what the paper says
    of active slices (`table1.PAPER_ACTIVE`). A toy of sparse features has its parts in the place of texts.
    """
    exploration = Exploration(run, seed=seed)
    report(Progress("how good it is", 1, STAGES))
    evaluation = measured(run, run.seed_or(seed), report)
    report(Progress("what slices read and promote", 2, STAGES))
    slices, active = slice_entries(exploration)
    report(Progress("curves and attention", 3, STAGES))
    name = run.recipe.name if run.directory is None else str(run.directory)
    shared: dict[str, Any] = {
        "title": f"{name}: {target_name(run)} taken apart",
        "about": about(run),
        "commands": commands(run),
        "curves": curves(run, folder),
        "evidence": evidence(evaluation),
        "slices": slices,
        "active": active,
    }
    if run.subject.feature_toy is not None:
        return Page(
            **shared,
            measured=[*found_parts(evaluation), metrics(evaluation)],
            maps=feature_maps(exploration),
            parts=part_tables(run),
            part_pictures=[feature_picture(run, folder)],
            token="feature",
            text="input",
        )
    return Page(
        **shared,
        measured=[*active_slices(evaluation, paper or {}), metrics(evaluation)],
        maps=token_maps(exploration),
        patterns=attention(exploration, folder),
        facts=[] if facts is None else fact_sections(facts, fact_figures),
        fact_pictures=[] if facts is None else all_facts_pictures(facts, fact_figures),
        kinds=[] if facts is None else kinds_of_rows(facts),
    )


def target_name(run: LoadedRun) -> str:
    """The model's own name, or the kind of toy."""
    target = run.recipe.target
    return Path(getattr(target, "model", None) or target.kind).stem


def measured(run: LoadedRun, seed: int, report: Report = silent) -> Mapping[str, Any]:
    """`spd.eval/2` as the run's eval.json has it; measured now, with no masks sought, where there is none of it."""
    kept = {} if run.directory is None else kept_result(run.directory, EVAL, report)
    if "metrics" in kept:
        return kept
    said: Mapping[str, Any] = plain(evaluate(run.subject, run.decomposition, SEQUENCES, 0.0, seed, NO_SEARCH))
    return said


def curves(run: LoadedRun, folder: Path) -> list[Picture]:
    """How the losses fell, and how many slices stayed; of a toy that was trained for the run, its training too."""
    if run.directory is None or not run.home.metrics():
        return []
    records = run.home.metrics()
    first, last = (sum(record["active"].values()) for record in (records[0], records[-1]))
    said = f"from {records[0]['total']:.3g} to {records[-1]['total']:.3g}; active slices from {first:.4g} to {last:.4g}"
    (_, file) = save_decomposition_curves(records, folder)
    pictures = [
        Picture(
            file, "The terms of the loss, and active slices a position, against the step.", f"The loss goes {said}."
        )
    ]
    if (run.home / TOY / METRICS).exists():
        trained = RunDirectory(run.home / TOY).metrics()
        (_, file) = save_training_curve(trained, folder)
        words = f"The loss ends at {trained[-1]['loss']:.3g}."
        figure = "" if run.subject.toy is None else " (Figure 5)"
        pictures.append(Picture(file, f"The toy's loss while it was trained{figure}.", words))
    return pictures


def attention(exploration: Exploration, folder: Path) -> list[Picture]:
    """Attention of the target and of active slices alone on the run's first text; nothing where a target does not tell
    it, or where the text is long."""
    view, run = exploration.prompt(1), exploration.run
    target, decomposition = run.subject.target, run.decomposition
    if len(view.pieces) > LONGEST_PATTERN:
        return []
    if target.record_patterns is None:
        patterns = language_patterns(target, decomposition, view.clean.batch.tokens)
    else:
        g = {name: values[:1, : len(view.pieces)] for name, values in view.active.g.items()}
        patterns = patterns_of(target, decomposition, view.clean, g)
    if patterns is None:
        return []
    blocks = 1 + max(target.matrices[name].block for name in decomposition.names)
    shown = slice(min(blocks, MOST_BLOCKS))
    (_, file) = save_patterns(patterns.target[shown], patterns.masked[shown], folder)
    caption = "Attention on the first text, a row a block and a column a head: the target, and active slices alone."
    return [Picture(file, caption, f"In each tile queries are rows and keys columns; the text is {view.text}.")]
