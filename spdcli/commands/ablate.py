"""`spd ablate`: what a model says without some of its slices, matrices or MLP layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spdcli.commands import completion
from spdcli.commands.edit_options import Answer, FactsOption, NoFacts, Prompt, Sequences, SliceAddress, exam_options
from spdcli.commands.effect_tables import alone_table, effects_table, facts_tables, in_title, prompts_only, quiet_lines
from spdcli.commands.opening import opened
from spdcli.commands.options import Device, Json, Quiet, RunPath, Seed, Verbose, make_console
from spdcli.edits.choices import OTHERS, USUAL_OTHERS, in_words
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.console import Console
    from spdcli.edits.ablation import AblationReport, Masking
    from spdcli.edits.answer_changes import AnswerChanges
    from spdcli.edits.suppression import Address
    from spdcli.edits.zeroing import Zeroed
    from spdcli.runs.loading import LoadedRun

    Others = str
else:
    Others = Literal[tuple(OTHERS)]

MatrixName = Annotated[
    list[str] | None,
    typer.Option(
        "--matrix",
        "-m",
        help="Zero this whole matrix; may be repeated.",
        autocompletion=completion.matrices,
        show_default=False,
    ),
]
Mlp = Annotated[
    list[str] | None,
    typer.Option("--mlp", help="Zero this MLP layer, from 0; 'all' is each; may be repeated.", show_default=False),
]
OthersOption = Annotated[
    Others | None,
    typer.Option("--others", help=f"Masks of the other slices: {in_words(OTHERS)}.", show_default=USUAL_OTHERS),
]
WithFigure = Annotated[
    bool, typer.Option("--figure", help="With --mlp, draw P(answer) against the zeroed layer into RUN/figures.")
]
Samples = Annotated[int, typer.Option("--samples", min=1, max=10**6, help="Draws of --others sampled.")]


def ablate(
    run: RunPath,
    slice: SliceAddress = None,
    matrix: MatrixName = None,
    mlp: Mlp = None,
    others: OthersOption = None,
    samples: Samples = 16,
    figure: WithFigure = False,
    prompt: Prompt = None,
    answer: Answer = None,
    facts: FactsOption = None,
    no_facts: NoFacts = False,
    sequences: Sequences = 16,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Take slices out of the decomposed model, or matrices and MLP layers out of the target.

    Slices get the mask 0 in the decomposed model, the others --others. Without
    --slice, the target itself runs with the matrices or MLP layers zeroed
    (Figure 9). Several things are taken away together, then each alone. What
    that does to other facts is measured for all of them together.
    """
    console = make_console(json, quiet, verbose)
    check_usage(slice or [], matrix or [], mlp or [], others, figure)
    each_mlp = bool(mlp and "all" in mlp)
    options = exam_options(prompt, answer, facts, no_facts, sequences, all_mlp=each_mlp)
    from spdcli.edits.ablation import Masking
    from spdcli.edits.ablation import ablate as ablate_run
    from spdcli.edits.suppression import find_slices
    from spdcli.edits.zeroing import zeroed_parts
    from spdcli.records import plain

    loaded = opened(console, run, device)
    seed = loaded.seed_or(seed)
    slices = find_slices(loaded.decomposition, slice or [])
    zeroed = zeroed_parts(loaded.subject.target, matrix or [], mlp or [])
    masking = Masking(others or USUAL_OTHERS, samples, seed)
    if loaded.subject.feature_toy is not None:
        if mlp or options.prompts or options.named:
            raise UsageError("of a toy of sparse features every feature is looked at", "give --slice or --matrix alone")
        show_features(console, run, loaded, slices, zeroed, masking)
        return
    if slices and masking.others == "on" and not loaded.decomposition.delta:
        console.warn("this run has no delta component: with all slices on it is U V, before is not the target")
    exam = options.open(console, loaded.recipe, loaded.subject, seed, loaded.decomposition if slices else None)
    with console.progress("measuring what is lost") as progress:
        report = ablate_run(loaded.subject, loaded.decomposition, exam, slices, zeroed, masking, progress)
    drawings = draw_layers(report.alone, run) if figure else []
    data = {"schema": "spd.suppress/1", "run": str(run), **plain(report), "saved": None, "figures": drawings}
    console.show(data, *tables(report, each_mlp, verbose))
    quiet_lines(console, report.effects)
    for path in drawings[:1]:
        console.result(path)


def tables(report: AblationReport, each_mlp: bool, verbose: bool) -> list[RenderableType]:
    """The effects of all together, unless that is each MLP layer; of each alone; and what becomes of the facts."""
    others = f" (others {report.others})" if report.others else ""
    title = f"Without {in_title([*report.slices, *report.zeroed])}{others}"
    whole = [] if each_mlp else [effects_table(title, prompts_only(report.effects))]
    return [*whole, *alone_table(report.alone), *facts_tables(report.facts, report.effects, verbose)]


def check_usage(
    slices: Sequence[str], matrices: Sequence[str], mlps: list[str], others: str | None, figure: bool
) -> None:
    """UsageError for options that say nothing, or contradict each other."""
    if not (slices or matrices or mlps):
        raise UsageError("nothing to ablate", "give --slice ADDRESS, --matrix NAME or --mlp N")
    if others and not slices:
        raise UsageError("--others is about the slices of a decomposed model, and no --slice is given")
    if figure and len(mlps) < 2 and mlps != ["all"]:
        raise UsageError("--figure draws one MLP layer after the other", "give --mlp all, or several --mlp")


def show_features(
    console: Console,
    run: Path,
    loaded: LoadedRun,
    slices: Sequence[Address],
    zeroed: Sequence[Zeroed],
    masking: Masking,
) -> None:
    """What every feature of a toy of sparse features loses."""
    from spdcli.commands.feature_tables import ablation_table
    from spdcli.edits.feature_ablation import ablate_features
    from spdcli.records import plain

    lost = ablate_features(loaded.subject, loaded.decomposition, slices, zeroed, masking)
    console.show({"schema": "spd.ablate.features/1", "run": run, **plain(lost)}, ablation_table(lost))


def draw_layers(alone: Mapping[str, AnswerChanges], run: Path) -> list[Path]:
    """Figure 9 of the MLP layers among what was zeroed alone; a single layer of a model is all of them."""
    from spdcli.figures.facts import save_zeroed
    from spdcli.runs.directory import FIGURES

    layers = {label: effects for label, effects in alone.items() if label.startswith("mlp ")}
    if not layers:
        raise UsageError("--figure needs several layers, and this target has one")
    return save_zeroed(layers, run / FIGURES)
