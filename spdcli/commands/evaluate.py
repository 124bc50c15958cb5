"""`spd eval`: measure a decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from spdcli.commands.evidence_tables import evidence_tables, grade_of
from spdcli.commands.language_tables import language_tables, losses_line
from spdcli.commands.opening import opened
from spdcli.commands.options import (
    AdversaryOption,
    Device,
    Json,
    Quiet,
    RunPath,
    Seed,
    Starts,
    Threshold,
    Verbose,
    make_console,
)
from spdcli.engine.tables import GRADES
from spdcli.measures.evidence_choices import STARTS, USUAL_ADVERSARY, MaskSearch
from spdcli.paper.table1 import (
    PAPER_ACTIVE,
    PAPER_ATTENTION,
    PAPER_M_TO_S1,
    PAPER_M_TO_S1_UNPLACED,
    PAPER_METRICS,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from spdcli.measures.circuit import Circuit
    from spdcli.measures.evaluation import AnyEvaluation
    from spdcli.measures.gate_knowledge import Control
    from spdcli.measures.slice_recovery import Recovery
    from spdcli.measures.toy_evaluation import ToyEvaluation
    from spdcli.runs.subject import Subject

Sequences = Annotated[
    int | None,
    typer.Option(
        "--sequences",
        min=2,
        max=10**6,
        help="Fresh toy sequences, prompts or held-out sequences to measure on.",
        show_default="8192 of a toy; of text as many as have 512 tokens",
    ),
]

ENOUGH = 0.999  # share of sequences whose m is told right
FREE_PATTERNS = (
    "The pattern matters for m's query in layer 0 and for s2's in layer 1; "
    "what other positions attend to never reaches the last one, and is free."
)
LESS = (
    "no context: gates see their own position alone; other sequences, other positions: importances from there; "
    "always on: no gates, every slice that is active anywhere is on everywhere"
)
STEPS = {  # of the circuit: what it is called here, and the paper's number
    "m_to_s1": ("m attends to s1", PAPER_M_TO_S1),
    "m_to_s1_unplaced_query": ("  no encodings in m's query", PAPER_M_TO_S1_UNPLACED),
    "m_to_s1_unplaced_query_and_s1": ("  nor in s1's key", None),
    "m_to_s1_content_only": ("  nor in any key", None),
    "s2_to_m": ("s2 attends to m", None),
}


def evaluate(
    run: RunPath,
    sequences: Sequences = None,
    threshold: Threshold = 0.0,
    adversary: AdversaryOption = USUAL_ADVERSARY,
    starts: Starts = STARTS,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure a decomposition: active and unique slices, reconstruction, attention (Table 1).

    Reconstruction is told by how strong the evidence is: under importance masks, random
    ones, with the delta at 0, ½ and 1, and under the worst masks that a search by gradient
    finds (PGD). The toy is measured on fresh sequences and set beside the paper, its circuit explained
    (section 6.1) and drawn into RUN/figures; a language model is measured on its prompts,
    or on text that it was not trained on; of a toy of sparse features it is told whether
    its known parts were found.
    """
    console = make_console(json, quiet, verbose)
    from spdcli.figures.run_files import write_evaluation
    from spdcli.measures.evaluation import evaluate as measure
    from spdcli.runs.directory import EVAL

    loaded = opened(console, run, device)
    sought = MaskSearch(adversary, starts)
    own, seed = (loaded.subject, loaded.decomposition), loaded.seed_or(seed)
    with console.progress("measuring, and seeking masks that break it") as report:
        evaluation = measure(*own, sequences, threshold, seed, sought, report)
    console.show(write_evaluation(loaded, evaluation), *render(evaluation, loaded.subject))
    if evaluation.worse_than_none:
        recon, nothing = evaluation.metrics["recon"], evaluation.all_off
        console.warn(
            f"this decomposition is worse than none: recon is {recon:.3g}, and {nothing:.3g} with every slice off"
        )
    console.result(run / EVAL)


def render(evaluation: AnyEvaluation, subject: Subject) -> list[Table | str]:
    """What a person sees of an evaluation."""
    from spdcli.measures.feature_evaluation import FeatureEvaluation
    from spdcli.measures.language_evaluation import LanguageEvaluation

    if isinstance(evaluation, FeatureEvaluation):
        from spdcli.commands.feature_tables import feature_tables

        return feature_tables(evaluation)
    if evaluation.recovery:
        return [recovery_table(evaluation.recovery), losses_line(evaluation), *evidence_tables(evaluation.evidence)]
    if isinstance(evaluation, LanguageEvaluation):
        return language_tables(evaluation, subject)
    circuit = circuit_tables(evaluation.circuit) if evaluation.circuit else []
    evidence = evidence_tables(evaluation.evidence)
    return [active_table(evaluation), metrics_table(evaluation), FREE_PATTERNS, *evidence, *circuit]


def active_table(evaluation: ToyEvaluation) -> Table:
    """Tables 1a and 1b, with the paper's numbers in brackets."""
    from rich.table import Table

    active = Table(title="Average active slices a position, and unique slices (the paper's in brackets)")
    active.add_column("")
    for heading in ("s1", "m", "s2", "random", "unique"):
        active.add_column(heading, justify="right")
    for name, classes in evaluation.active.items():
        ours = [f"{classes[kind]:.3f}" for kind in ("s1", "m", "s2", "random")] + [str(evaluation.unique[name])]
        paper = (
            [f" ({value:.3f})" for value in PAPER_ACTIVE[name][:4]] + [f" ({PAPER_ACTIVE[name][4]})"]
            if name in PAPER_ACTIVE
            else [""] * 5
        )
        active.add_row(name, *(mine + theirs for mine, theirs in zip(ours, paper, strict=True)))
    return active


def metrics_table(evaluation: ToyEvaluation) -> Table:
    """Table 1c beside the paper's."""
    from rich.table import Table

    metrics = Table(title=f"Metrics over {evaluation.sequences} sequences")
    for heading in ("", "evidence", "ours", "standard error", "paper"):
        metrics.add_column(heading, justify="left" if heading in ("", "evidence") else "right")
    weakest = GRADES["importance"].label
    for name, value in evaluation.metrics.items():
        error = evaluation.standard_error[name]
        shown = (f"{value:.1e}", f"{error:.0e}" if error else "exact", _paper(PAPER_METRICS.get(name)))
        metrics.add_row(name, grade_of(name), *shown)
    paper = dict(enumerate(PAPER_ATTENTION))
    for value, split in zip(evaluation.attention_kl, evaluation.attention_kl_split, strict=True):
        shown = (f"{value:.3f}", "", _paper(paper.get(split.layer)))
        metrics.add_row(f"attention KL, layer {split.layer}", weakest, *shown)
        parts = {"where the pattern matters": split.matters, "everywhere else": split.rest, "at the last": split.last}
        for what, part in parts.items():
            if part is not None:
                metrics.add_row(f"  {what}", "", f"{part:.3f}", "", "")
    for kind, share in (("target", evaluation.accuracy.target), ("masked", evaluation.accuracy.masked)):
        metrics.add_row(f"accuracy, {kind} model", weakest if kind == "masked" else "", f"{share:.2%}", "", "")
    return metrics


def circuit_tables(circuit: Circuit) -> list[Table | str]:
    """The mechanism of section 6.1, and what is left of it without the gates' knowledge."""
    from rich.table import Table

    attention = Table(title=f"Attention of the circuit over {circuit.sequences} sequences")
    for heading in ("", "target", "active slices alone", "paper"):
        attention.add_column(heading, justify="left" if not heading else "right")
    for key, (label, paper) in STEPS.items():
        target, masked = (getattr(one, key) for one in (circuit.attention.target, circuit.attention.masked))
        attention.add_row(label, f"{target:.4f}", f"{masked:.4f}", _paper(paper))
    return [attention, needs_table(circuit), *_slice_lines(circuit), controls_table(circuit.controls)]


def controls_table(controls: Mapping[str, Control]) -> Table:
    """Accuracy when all gates, those of one layer or those of one matrix know less; attention when all do."""
    from rich.table import Table

    table = Table(title="Accuracy of active slices alone when all gates, or those of a part, know less", caption=LESS)
    for heading in ("importances", "all", "m to s1", "s2 to m", "layer 0", "layer 1"):
        table.add_column(heading, justify="left" if heading == "importances" else "right")
    table.add_column("one matrix (%)")
    for name, control in controls.items():
        steps = [f"{control.all.m_to_s1:.3f}", f"{control.all.s2_to_m:.3f}"]
        layers = [f"{one.accuracy:.0%}" for one in control.layers]
        layers += [""] * (2 - len(layers))
        each = "  ".join(f"{matrix} {100 * one.accuracy:.0f}" for matrix, one in control.matrices.items())
        table.add_row(name.replace("_", " "), f"{control.all.accuracy:.2%}", *steps, *layers, each)
    return table


def needs_table(circuit: Circuit) -> Table:
    """What the target loses when a matrix writes nothing at a position class."""
    from rich.table import Table

    table = Table(title="KL (nats) of the target without a matrix there: where it is needed")
    table.add_column("")
    for kind in next(iter(circuit.needs.values())):
        table.add_column(kind, justify="right")
    for name, losses in circuit.needs.items():
        table.add_row(name, *(f"{loss:.1e}" for loss in losses.values()))
    return table


def _slice_lines(circuit: Circuit) -> list[str]:
    """Which slice of K0 finds the next position, and what V1 spans."""
    lines = []
    offsets, identity = circuit.offsets, circuit.identity
    if offsets is not None and offsets.aligns is not None:
        best = next(entry for entry in offsets.slices if entry.slice == offsets.aligns)
        lines.append(
            f"{best.slice} aligns token n with position n+1: by the encodings alone its score there is "
            f"{best.contrast:.2f} above other offsets' (all of K0: {offsets.whole.contrast:.2f})."
        )
    if identity is not None:
        enough = next((k for k, right in enumerate(identity.decoding, 1) if right >= ENOUGH), None)
        needed = f"more than {len(identity.decoding)}" if enough is None else str(enough)
        lines.append(
            f"V1's active slices: {identity.above_one_percent} singular values above 1 % of the largest, "
            f"participation ratio {identity.participation:.1f}; "
            f"{needed} directions tell m right in {ENOUGH:.1%} of sequences."
        )
    return lines


def _paper(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def recovery_table(recovery: Recovery) -> Table:
    """How well the slices of a planted target are found, by matrix and of all together."""
    from rich.table import Table

    table = Table(
        title="Planted slices that are found", caption="Cosines as the data sees slices; matches from 0.95 on."
    )
    numbers = ("precision", "recall", "cosine", "missing", "idle")
    for heading in ("matrix", "planted", "active", "matches", *numbers):
        table.add_column(heading, justify="left" if heading == "matrix" else "right")
    for name, one in {**recovery.matrices, "all": recovery.total}.items():
        shares = [f"{getattr(one, key):.3f}" for key in numbers]
        table.add_row(name, str(one.planted), str(one.active), str(one.matches), *shares)
    return table
