"""The paper's figures of one run, by their numbers in the paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spdcli.edits.ablation import ablate
from spdcli.edits.exam import open_exam
from spdcli.edits.facts_file import Facts, load_facts
from spdcli.edits.zeroing import zeroed_parts
from spdcli.errors import UsageError
from spdcli.figures.circuit import save_sequence
from spdcli.figures.curves import save_rank_curves, save_training_curve
from spdcli.figures.facts import save_names, save_slices, save_trace, save_zeroed
from spdcli.figures.table import FIGURES
from spdcli.location.report import RunReport, report_facts
from spdcli.location.tracing import TraceSettings, trace
from spdcli.measures.circuit import circuit_example
from spdcli.measures.svd import svd_curves
from spdcli.progress import Report, silent
from spdcli.runs.directory import METRICS, TOY, RunDirectory
from spdcli.runs.loading import LoadedRun
from spdcli.runs.subject import require_tokens

Draw = Callable[[LoadedRun, Path, Facts | None, Report], list[Path]]


def draw_figure(
    run: LoadedRun, number: int, folder: Path, facts: Facts | None = None, report: Report = silent
) -> list[Path]:
    """Draw a figure of the paper, of this run, into `folder`: PNG and SVG.

    `facts` are for Figures 3 and 4, those that come with spd if None. UsageError for a number that is no drawing, and
    for a figure of another kind of target.
    """
    known = {figure.number: figure for figure in FIGURES}
    if number not in known:
        raise UsageError(f"the paper has no Figure {number}", f"it has {min(known)} to {max(known)}")
    if number not in DRAWN:
        raise UsageError(f"Figure {number} is no drawing: {known[number].shows}", known[number].command)
    folder.mkdir(parents=True, exist_ok=True)
    return DRAWN[number](run, folder, facts, report)


def sequence(run: LoadedRun, folder: Path, facts: Facts | None, report: Report) -> list[Path]:
    """Figure 1, of the induction toy."""
    if run.subject.toy is None:
        raise UsageError("Figure 1 is of the induction toy, and this run is of another target")
    example = circuit_example(run.subject, run.decomposition, 0.0, run.recipe.seed)
    return save_sequence(example, [run.subject.token_text(token) for token in example.tokens], folder)


def rank_curves(run: LoadedRun, folder: Path, facts: Facts | None, report: Report) -> list[Path]:
    """Figure 2, of every target."""
    return save_rank_curves(svd_curves(run.subject, run.decomposition, seed=run.recipe.seed, report=report), folder)


def toy_training(run: LoadedRun, folder: Path, facts: Facts | None, report: Report) -> list[Path]:
    """Figure 5, of a toy that was trained for the run."""
    if run.directory is None or not (run.home / TOY / METRICS).exists():
        raise UsageError("Figure 5 is of a toy that the run has trained, and there is no record of one here")
    return save_training_curve(RunDirectory(run.home / TOY).metrics(), folder)


def zeroed(run: LoadedRun, folder: Path, facts: Facts | None, report: Report) -> list[Path]:
    """Figure 9, of targets with MLPs."""
    require_tokens(run.subject)
    layers = zeroed_parts(run.subject.target, [], ["all"])
    if len(layers) < 2:
        raise UsageError("Figure 9 needs several MLP layers, and this target has fewer")
    exam = open_exam(run.subject, (), None, seed=run.recipe.seed, report=report)
    return save_zeroed(ablate(run.subject, run.decomposition, exam, (), layers).alone, folder)


def traced(number: int) -> Draw:
    """Figure 7 or 8: causal tracing of the first prompt, or of the second."""

    def draw(run: LoadedRun, folder: Path, facts: Facts | None, report: Report) -> list[Path]:
        prompts = run.subject.prompts
        if run.recipe.data is None or prompts is None or len(prompts.texts) < number:
            raise UsageError(f"Figure {6 + number} is of prompt {number} of a language model, which this run has not")
        settings = TraceSettings(seed=run.recipe.seed)
        text, target = prompts.texts[number - 1], run.subject.target
        (one,) = trace(target, prompts.tokenizer, [text], (), settings, prompts.begin_token, report)
        return save_trace(one, folder, f"trace-{number}")

    return draw


def facts_of(run: LoadedRun, facts: Facts | None, report: Report) -> RunReport:
    """What `spd report` says of the run's facts; UsageError where no slice was found by rule."""
    recipe, facts = run.recipe, facts or load_facts()
    told = report_facts(run.subject, run.decomposition, recipe.data, recipe.slices.ridge, facts, report=report)
    if not any(fact.slices for fact in told.prompts):
        raise UsageError("the rule finds no slice in this run, so that none is suppressed", "spd report tells the rule")
    return told


def all_slices(run: LoadedRun, folder: Path, facts: Facts | None, report: Report) -> list[Path]:
    """Figure 3, of a language model's facts."""
    return save_slices(facts_of(run, facts, report), folder)


def names(run: LoadedRun, folder: Path, facts: Facts | None, report: Report) -> list[Path]:
    """Figure 4, of a language model's facts: one a prompt."""
    told = facts_of(run, facts, report)
    drawn = [save_names(fact, row, folder, f"names-{row + 1}") for row, fact in enumerate(told.prompts) if fact.slices]
    return [path for paths in drawn for path in paths]


DRAWN: dict[int, Draw] = {
    1: sequence,
    2: rank_curves,
    3: all_slices,
    4: names,
    5: toy_training,
    7: traced(1),
    8: traced(2),
    9: zeroed,
}
