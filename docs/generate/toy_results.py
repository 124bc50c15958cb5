"""Results of the induction toy as Markdown: training, `spd eval` and the paper's Table 1, `spd svd`, seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generate.evidence_results import evidence
from generate.markdown import duration, joined, number, size, table
from spdcli.commands.evaluate import STEPS
from spdcli.commands.evidence_tables import grade_of
from spdcli.engine.tables import GRADES
from spdcli.paper.table1 import CLASSES, PAPER_ACTIVE, PAPER_ATTENTION, PAPER_METRICS

Data = Mapping[str, Any]


def training(data: Data) -> str:
    """`spd.train/1`: what the toy learned."""
    return (
        f"Loss {number(data['loss'])} after {data['steps']} steps, right on {data['accuracy']:.2%} of fresh sequences."
    )


def decomposing(data: Data) -> str:
    """`spd.decompose/1`: the last record of the training."""
    active = sum(data["active"].values())
    losses = table(["loss", "value"], [[name, number(value)] for name, value in data["losses"].items()])
    words = f"Total loss {number(data['total'])} after {data['step']} steps and {duration(data['seconds'])} of training"
    return joined([f"{words}; {active:.2f} active slices a position.", losses])


def evaluation(data: Data) -> str:
    """`spd.eval/2` of a toy: Table 1, the metrics, the circuit, and what is left when gates know less."""
    parts = [active_slices(data), metrics(data), evidence(data)]
    if "circuit" in data:
        parts += [circuit(data["circuit"]), gate_knowledge(data["circuit"]["controls"])]
    return joined(parts)


def active_slices(data: Data) -> str:
    """Tables 1a and 1b, the paper's numbers in brackets."""
    rows = []
    for name, classes in data["active"].items():
        ours = [f"{classes[kind]:.3f}" for kind in CLASSES] + [str(data["unique"][name])]
        paper = PAPER_ACTIVE.get(name)
        beside = [""] * 5 if paper is None else [f" ({value:.3f})" for value in paper[:4]] + [f" ({paper[4]})"]
        rows.append([name, *(mine + theirs for mine, theirs in zip(ours, beside, strict=True))])
    heads = ["matrix", *CLASSES, "unique"]
    return joined(
        ["Average active slices a position, and unique slices (the paper's in brackets):", table(heads, rows)]
    )


def metrics(data: Data) -> str:
    """Table 1c: reconstruction, attention, accuracy."""
    errors, weakest = data["standard_error"], GRADES["importance"].label
    rows = [
        [
            name,
            grade_of(name),
            number(value),
            number(errors[name]) if errors[name] else "exact",
            paper(PAPER_METRICS.get(name)),
        ]
        for name, value in data["metrics"].items()
    ]
    for layer, value in enumerate(data["attention_kl"]):
        theirs = PAPER_ATTENTION[layer] if layer < len(PAPER_ATTENTION) else None
        rows.append([f"attention KL, layer {layer}", weakest, number(value), "", paper(theirs)])
        split = data["attention_kl_split"][layer]
        parts = {"matters": "where the pattern matters", "rest": "everywhere else", "last": "at the last query"}
        for kind, where in parts.items():
            if split.get(kind) is not None:
                rows.append([f"the same, {where}", "", number(split[kind]), "", ""])
    for kind, value in data["accuracy"].items():
        rows.append([f"accuracy, {kind} model", weakest if kind == "masked" else "", f"{value:.2%}", "", ""])
    shown = table(["metric", "evidence", "ours", "standard error", "paper"], rows, words=2)
    return joined([f"Over {data['sequences']} fresh sequences:", shown])


def circuit(data: Data) -> str:
    """The mechanism of section 6.1: who attends to whom."""
    attention = data["attention"]
    rows = [
        [label.replace("  ", "– "), number(attention["target"][key]), number(attention["masked"][key]), paper(theirs)]
        for key, (label, theirs) in STEPS.items()
    ]
    shown = table(["attention", "target", "active slices alone", "paper"], rows)
    words = "KL (nats) of the target without a matrix there, which is where slices can have to be active:"
    lost = [[name, *map(number, losses.values())] for name, losses in data["needs"].items()] if "needs" in data else []
    needed = joined([words, table(["matrix", *next(iter(data["needs"].values()))], lost)]) if lost else ""
    return joined([f"The circuit, over {data['sequences']} sequences:", shown, needed])


def gate_knowledge(controls: Data) -> str:
    """Accuracy of active slices alone when their gates know less."""
    rows = []
    for name, control in controls.items():
        whole = control["all"]
        layers = [f"{layer['accuracy']:.0%}" for layer in control["layers"]]
        steps = [number(whole[step]) for step in ("m_to_s1", "s2_to_m")]
        rows.append([name.replace("_", " "), f"{whole['accuracy']:.2%}", *steps, *[*layers, "", ""][:2]])
    heads = ["importances", "all gates", "m to s1", "s2 to m", "layer 0 alone", "layer 1 alone"]
    words = (
        "Accuracy of active slices alone when all gates, or those of one layer, know less. *No context*: gates see "
        "their own position alone; *other sequences*, *other positions*: importances from there; *always on*: every "
        "slice that is active anywhere is on everywhere."
    )
    return joined([words, table(heads, rows)])


def ranks(data: Data) -> str:
    """`spd.svd/1`: what each method has left at the tolerance (Figure 2)."""
    outcomes = {name: outcome for name, outcome in data["result"].items() if outcome}
    matrices = next(iter(outcomes.values()))["ranks"] if outcomes else {}
    rows: list[list[Any]] = [[name, *(rank(outcomes[one]["ranks"][name]) for one in outcomes)] for name in matrices]
    rows.append(["all", *(rank(outcome["total_rank"]) for outcome in outcomes.values())])
    rows.append(["KL", *(number(outcome["kl"]) for outcome in outcomes.values())])
    never = [name for name in data["result"] if name not in outcomes]
    words = f"Left at a KL of at most {data['tolerance']:g} over {data['looked_at']} predictions:"
    legend = "; ".join(f"`{name}` is {data['legend'][name]}" for name in outcomes) + "."
    missed = f"Never within the tolerance: {', '.join(f'`{name}`' for name in never)}." if never else ""
    return joined([words, table(["matrix", *(f"`{name}`" for name in outcomes)], rows), legend, missed])


def rank(value: float | None) -> str:
    """A rank: a number of slices, or a mean of such numbers."""
    return "" if value is None else f"{value:g}" if isinstance(value, int) else f"{value:.3f}"


def reproduction(data: Data) -> str:
    """`spd.reproduce/1` of the toy: every number of Table 1 over the seeds, then seed by seed."""
    several = len(data["seeds"]) > 1
    rows = []
    for row in data["rows"]:
        spread = [number(row["spread"][key]) for key in ("std", "min", "max")] if several else []
        theirs = paper(row["paper"])
        bound = row["bound"] or f"({row['agreement']})"
        agrees = f"{row['share']:.0%} of seeds" if several else ("yes" if row["agrees"] else "no")
        graded = GRADES[row["grade"]].label if row.get("grade") else ""
        rows.append([row["name"], graded, number(row["ours"]), *spread, theirs, bound, agrees])
    heads = [
        "",
        "evidence",
        "ours",
        *(["std", "least", "most"] if several else []),
        "paper",
        "bound",
        "holds on" if several else "holds",
    ]
    words = f"Mean of {len(data['seeds'])} seeds. " if several else ""
    words += "Bounds in brackets are not stated ones: they say what counts as agreeing."
    return joined([words, table(heads, rows, words=2), seeds(data), stability(data["stability"])])


def variants(data: Data) -> str:
    """`spd reproduce variants`."""
    names = ["positions", "bos", "O"]
    target_heads = [*names, "accuracy", "m to s1", "query unplaced", "s2 to m", "W_Q0", "W_K0", "KL without Q0 at m"]
    own_heads = [*names, *data["variants"][0]["active"], "recon", "layerwise", "minutes"]
    target_rows, own_rows = [], []
    for one in data["variants"]:
        switches = [one["positions"], *("yes" if one[key] else "" for key in ("begin_token", "output_projection"))]
        attention = [number(one[key]) for key in ("m_to_s1", "m_to_s1_unplaced_query", "s2_to_m")]
        values = [" ".join(f"{value:.2g}" for value in one["singular_values"][matrix]) for matrix in ("Q0", "K0")]
        target_rows.append([*switches, f"{one['accuracy']:.2%}", *attention, *values, number(one["needs"]["Q0"])])
        counts = [f"{one['unique'][matrix]} ({number(value)})" for matrix, value in one["active"].items()]
        metrics_ = [number(one["metrics"][key]) for key in ("recon", "recon_layerwise")]
        own_rows.append([*switches, *counts, *metrics_, f"{one['minutes']:.1f}"])
    words = "The targets: attention of the circuit's two steps, and the largest singular values of two matrices."
    about = "Their decompositions: unique slices, and in brackets those active where the paper has them."
    return joined([words, table(target_heads, target_rows), about, table(own_heads, own_rows)])


def seeds(data: Data) -> str:
    """A line a seed: how many bounds it breaks, and what every method of `spd svd` has left."""
    methods = list(data["seeds"][0]["svd"]["rank"])
    rows = []
    for seed in data["seeds"]:
        left = [rank(seed["svd"]["rank"][name]) or "never" for name in methods]
        rows.append([seed["seed"], len(seed["broken"]), size(seed["toy_accuracy"], 2), *left])
    heads = ["seed", "bounds broken", "toy right", *(f"rank, `{name}`" for name in methods)]
    tolerance = data["seeds"][0]["svd"]["tolerance"]
    return joined([f"Seed by seed; rank is what is left at a KL of {tolerance:g}:", table(heads, rows)])


def stability(data: Data | None) -> str:
    """How well each seed's slices are found again by the others."""
    if data is None:
        return ""
    rows = [
        [name, entry["slices"], number(entry["mean"]), number(entry["min"])] for name, entry in data["matrices"].items()
    ]
    words = f"Similarity of a slice to its match in other seeds, by {data['definition']}:"
    return joined([words, table(["matrix", "slices", "mean", "least"], rows)])


def paper(value: float | None) -> str:
    """The paper's number; nothing where it has none."""
    return "" if value is None else number(value)
