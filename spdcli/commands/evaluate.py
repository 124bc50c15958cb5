"""`spd eval`: measure a decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from spdcli.commands.options import Device, Json, Quiet, RunPath, Seed, Threshold, Verbose, make_console

if TYPE_CHECKING:
    from rich.table import Table

Sequences = Annotated[int, typer.Option("--sequences", min=2, help="Fresh toy sequences to measure on.")]

# Table 1 of the paper: active a position (s1, m, s2, random), unique slices; then its metrics.
PAPER_ACTIVE = {
    "Q0": (0.000, 1.000, 0.000, 0.001, 1),
    "K0": (1.000, 0.050, 0.000, 0.183, 1),
    "V0": (1.000, 0.000, 0.000, 0.000, 1),
    "Q1": (0.000, 0.000, 1.000, 0.000, 1),
    "K1": (0.000, 1.000, 0.000, 0.000, 1),
    "V1": (0.000, 5.053, 0.000, 0.000, 11),
}
PAPER_METRICS = {"faithfulness": 3e-9, "recon": 1e-4, "recon_layerwise": 1e-4}
PAPER_ATTENTION = (0.385, 0.002)


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

    The toy is measured on fresh sequences and set beside the paper; a language model on its prompts.
    """
    console = make_console(json, quiet, verbose)
    from spdcli.analysis.evaluation import evaluate as measure
    from spdcli.loading import load
    from spdcli.runs import EVAL, write_json

    loaded = load(run, device)
    found = measure(
        loaded.subject, loaded.decomposition, sequences, threshold, loaded.recipe.seed if seed is None else seed
    )
    data: dict[str, Any] = {"schema": "spd.eval/1", "run": str(run), "target": loaded.recipe.target.kind, **found}
    write_json(run / EVAL, data)
    prompts = loaded.subject.prompts
    parts = toy_tables(data) if prompts is None else language_tables(data, prompts.pieces)
    console.show(data, *parts)
    console.result(run / EVAL)


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
    for kind, value in data["accuracy"].items():
        metrics.add_row(f"accuracy, {kind} model", f"{value:.2%}", "", "")
    return [active, metrics]


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
        f"Cross-entropy of the text, nats a token: target {entropy['target']:.3f}, "
        f"active slices alone {entropy['masked']:.3f}.",
    ]
