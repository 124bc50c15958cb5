"""`spd eval`: measure a decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from spdcli.commands.options import Device, Json, Quiet, RunPath, Seed, Threshold, Verbose, make_console
from spdcli.paper.table1 import (
    PAPER_ACTIVE,
    PAPER_ATTENTION,
    PAPER_M_TO_S1,
    PAPER_M_TO_S1_UNPLACED,
    PAPER_METRICS,
)

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.runs.loading import LoadedRun

Sequences = Annotated[int, typer.Option("--sequences", min=2, help="Fresh toy sequences to measure on.")]

ENOUGH = 0.999  # share of sequences whose m is told right
FREE_PATTERNS = (
    "The pattern matters for m's query in layer 1 and for s2's in layer 2; "
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
    sequences: Sequences = 8192,
    threshold: Threshold = 0.0,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure a decomposition: active and unique slices, reconstruction, attention (Table 1).

    The toy is measured on fresh sequences and set beside the paper, its circuit explained
    (section 6.1) and drawn into RUN/figures; a language model is measured on its prompts.
    """
    console = make_console(json, quiet, verbose)
    from spdcli.runs.directory import EVAL
    from spdcli.runs.loading import load

    loaded = load(run, device)
    console.debug(str(loaded))
    data = evaluate_run(loaded, sequences, threshold, loaded.recipe.seed if seed is None else seed)
    prompts = loaded.subject.prompts
    parts = toy_tables(data) if prompts is None else language_tables(data, prompts.pieces)
    console.show(data, *parts)
    console.result(run / EVAL)


def evaluate_run(loaded: LoadedRun, sequences: int, threshold: float, seed: int) -> dict[str, Any]:
    """Measures a run into its eval.json and, for a toy of the paper's kind, its figures; returns what it wrote."""
    from spdcli.files import write_json
    from spdcli.measures.circuit_data import has_circuit
    from spdcli.measures.evaluation import evaluate as measure
    from spdcli.runs.directory import EVAL

    found = measure(loaded.subject, loaded.decomposition, sequences, threshold, seed)
    run = loaded.home
    settings = {"run": str(run.path), "target": loaded.recipe.target.kind, "seed": seed, "threshold": threshold}
    data: dict[str, Any] = {"schema": "spd.eval/1", **settings, **found}
    if has_circuit(loaded.subject):
        data["circuit"] = explain(loaded, threshold, seed)
    write_json(run / EVAL, data)
    return data


def explain(loaded: LoadedRun, threshold: float, seed: int) -> dict[str, Any]:
    """The mechanism of the toy and what its gates know (section 6.1), with the figures of both."""
    from spdcli.figures.circuit import save_circuit
    from spdcli.measures import circuit, circuit_data
    from spdcli.measures import gate_knowledge as controls
    from spdcli.runs.directory import FIGURES

    subject = loaded.subject
    stage = circuit_data.circuit_data(subject, loaded.decomposition, circuit.SEQUENCES, threshold, seed)
    found = circuit.circuit(stage) | {"controls": controls.gate_controls(stage, seed)}
    shown = circuit.example(stage)
    save_circuit(found, shown, [subject.token_text(token) for token in shown["tokens"]], loaded.home / FIGURES)
    return found


def toy_tables(data: dict[str, Any]) -> list[Table | str]:
    """Table 1 with the paper's numbers in brackets."""
    from rich.table import Table

    active = Table(title="Average active slices a position, and unique slices (the paper's in brackets)")
    active.add_column("")
    for heading in ("s1", "m", "s2", "random", "unique"):
        active.add_column(heading, justify="right")
    for name, classes in data["active"].items():
        ours = [f"{classes[kind]:.3f}" for kind in ("s1", "m", "s2", "random")] + [str(data["unique"][name])]
        paper = (
            [f" ({value:.3f})" for value in PAPER_ACTIVE[name][:4]] + [f" ({PAPER_ACTIVE[name][4]})"]
            if name in PAPER_ACTIVE
            else [""] * 5
        )
        active.add_row(name, *(mine + theirs for mine, theirs in zip(ours, paper, strict=True)))
    metrics = Table(title=f"Metrics over {data['sequences']} sequences")
    for heading in ("", "ours", "standard error", "paper"):
        metrics.add_column(heading, justify="left" if not heading else "right")
    for name, value in data["metrics"].items():
        error = data["standard_error"][name]
        metrics.add_row(name, f"{value:.1e}", f"{error:.0e}" if error else "exact", _paper(PAPER_METRICS.get(name)))
    for layer, value in enumerate(data["attention_kl"]):
        metrics.add_row(
            f"attention KL, layer {layer + 1}", f"{value:.3f}", "", _paper(dict(enumerate(PAPER_ATTENTION)).get(layer))
        )
        for kind, what in (("matters", "where the pattern matters"), ("rest", "everywhere else")):
            if data["attention_kl_split"][layer][kind] is not None:
                metrics.add_row(f"  {what}", f"{data['attention_kl_split'][layer][kind]:.3f}", "", "")
    for kind, value in data["accuracy"].items():
        metrics.add_row(f"accuracy, {kind} model", f"{value:.2%}", "", "")
    explained = circuit_tables(data["circuit"]) if "circuit" in data else []
    return [active, metrics, FREE_PATTERNS, *explained]


def circuit_tables(circuit: dict[str, Any]) -> list[Table | str]:
    """The mechanism of section 6.1, and what is left of it without the gates' knowledge."""
    from rich.table import Table

    attention = Table(title=f"Attention of the circuit over {circuit['sequences']} sequences")
    for heading in ("", "target", "active slices alone", "paper"):
        attention.add_column(heading, justify="left" if not heading else "right")
    for key, (label, paper) in STEPS.items():
        target, masked = (circuit["attention"][kind][key] for kind in ("target", "masked"))
        attention.add_row(label, f"{target:.4f}", f"{masked:.4f}", _paper(paper))
    return [attention, *_slice_lines(circuit), controls_table(circuit["controls"])]


def controls_table(controls: dict[str, Any]) -> Table:
    """Accuracy when all gates, those of one layer or those of one matrix know less; attention when all do."""
    from rich.table import Table

    table = Table(title="Accuracy of active slices alone when all gates, or those of a part, know less", caption=LESS)
    for heading in ("importances", "all", "m to s1", "s2 to m", "layer 1", "layer 2"):
        table.add_column(heading, justify="left" if heading == "importances" else "right")
    table.add_column("one matrix (%)")
    for control, found in controls.items():
        whole = found["all"]
        steps = [f"{whole[step]:.3f}" for step in ("m_to_s1", "s2_to_m")]
        layers = [f"{one['accuracy']:.0%}" for one in found["layers"]]
        layers += [""] * (2 - len(layers))
        each = "  ".join(f"{name} {100 * one['accuracy']:.0f}" for name, one in found["matrices"].items())
        table.add_row(control.replace("_", " "), f"{whole['accuracy']:.2%}", *steps, *layers, each)
    return table


def _slice_lines(circuit: dict[str, Any]) -> list[str]:
    """Which slice of K0 finds the next position, and what V1 spans."""
    lines = []
    offsets, identity = circuit["offsets"], circuit["identity"]
    if offsets is not None and offsets["aligns"] is not None:
        best = next(entry for entry in offsets["slices"] if entry["slice"] == offsets["aligns"])
        lines.append(
            f"{best['slice']} aligns token n with position n+1: by the encodings alone its score there is "
            f"{best['contrast']:.2f} above other offsets' (all of K0: {offsets['whole']['contrast']:.2f})."
        )
    if identity is not None:
        enough = next((k for k, right in enumerate(identity["decoding"], 1) if right >= ENOUGH), None)
        needed = f"more than {len(identity['decoding'])}" if enough is None else str(enough)
        lines.append(
            f"V1's active slices: {identity['above_one_percent']} singular values above 1 % of the largest, "
            f"participation ratio {identity['participation']:.1f}; "
            f"{needed} directions tell m right in {ENOUGH:.1%} of sequences."
        )
    return lines


def _paper(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def language_tables(data: dict[str, Any], pieces: list[list[str]]) -> list[Table | str]:
    """Active slices a token and matrix, then what the model of active slices alone still predicts."""
    from rich.table import Table

    tables: list[Table | str] = []
    for prompt, tokens in enumerate(pieces):
        table = Table(title=f"Active slices a token, prompt {prompt + 1}")
        table.add_column("matrix")
        for token in tokens:
            table.add_column(token.strip() or repr(token), justify="right")
        for name, counts in data["active"].items():
            row = [counts[f"{prompt}:{position}"] for position in range(len(tokens))]
            if any(row):
                table.add_row(name, *(str(count) if count else "·" for count in row))
        tables.append(table)
    answers = Table(title="Probability of the answer")
    for heading in ("prompt", "answer", "target", "active slices alone"):
        answers.add_column(heading, justify="left" if heading in ("prompt", "answer") else "right")
    for answer in data["answers"]:
        answers.add_row(answer["prompt"], answer["answer"], f"{answer['target']:.3f}", f"{answer['masked']:.3f}")
    metrics = ", ".join(f"{name} {value:.2e}" for name, value in data["metrics"].items())
    entropy = data["cross_entropy"]
    return [
        *tables,
        answers,
        f"{data['total_active']} of {data['total_slices']} slices are active somewhere. {metrics}.",
        *grounding_lines(data["grounding"]),
        f"Cross-entropy of the text, nats a token: target {entropy['target']:.3f}, "
        f"active slices alone {entropy['masked']:.3f}.",
    ]


def grounding_lines(found: dict[str, Any]) -> list[str]:
    """How far active slices lie along the target's weights, and where they are."""
    if found["last_block"] is None:
        return []
    blocks = ", ".join(f"{block}: {count}" for block, count in found["blocks"].items())
    return [
        f"Of an active slice {found['in_weights']:.0%} is in the weights, of what active slices write "
        f"{found['in_outputs']:.0%} lies along the target's own answer (means). Active slices by block: {blocks}."
    ]
