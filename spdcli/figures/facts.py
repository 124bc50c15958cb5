"""Figures about facts (Figures 3 and 4; in A.3.2 Figures 7, 8 and 9): PNG and SVG, readable in grey."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spdcli.edits.answer_changes import AnswerChanges
from spdcli.figures.curves import save
from spdcli.location.report import FactReport, RunReport, SliceEffect
from spdcli.location.tracing import Trace

PANELS = {"state": "one hidden state", "mlp": "a window of MLPs", "attention": "a window of attention"}


def save_report(report: RunReport, directory: Path) -> list[Path]:
    """The figures of a report on facts: 3, 4, 7 or 8, and 9."""
    figures = save_zeroed(report.mlp_zeroed, directory)
    if any(fact.slices for fact in report.prompts):
        figures += save_slices(report, directory)
    for row, fact in enumerate(report.prompts):
        figures += save_trace(fact.trace, directory, f"trace-{row + 1}")
        if fact.slices:
            figures += save_names(fact, row, directory, f"names-{row + 1}")
    return figures


def save_trace(trace: Trace, directory: Path, name: str) -> list[Path]:
    """Figures 7 and 8: P(answer) after restoring each place, a panel a kind; `*` marks the corrupted tokens."""
    rows = [f"{token}{'*' if at in trace.subject else ''}" for at, token in enumerate(trace.tokens)]
    columns = len(trace.sites["state"].probability[0])
    figure = Figure(figsize=(3.2 * len(PANELS) + 1.6, 1.5 + 0.24 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    lowest = min(min(map(min, grid.probability)) for grid in trace.sites.values())
    highest = max(trace.clean, *(max(map(max, grid.probability)) for grid in trace.sites.values()))
    for axes, (kind, title) in zip(panels, PANELS.items(), strict=True):
        probability = trace.sites[kind].probability
        image = axes.imshow(probability, cmap="Greys", vmin=lowest, vmax=highest, aspect="auto")
        axes.set(title=title, xlabel="layer")
        axes.set_xticks(range(0, columns, max(1, columns // 6)))
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(labelsize="small")
    bar = figure.colorbar(image, ax=panels, pad=0.01)
    bar.set_label(f"P({trace.answer.strip()})")
    for level, style in ((trace.clean, "-"), (trace.corrupted, "--")):
        bar.ax.axhline(level, color="0.5", linestyle=style)
    figure.suptitle(f"“{trace.prompt}”: restoring", fontsize="medium")
    return save(figure, directory, name)


def save_zeroed(alone: Mapping[str, AnswerChanges], directory: Path) -> list[Path]:
    """Figure 9: P(answer) with each MLP layer zeroed, a panel a prompt; the dashed line is the whole model's.

    `alone` are effects by layer; the labels `mlp N` say which.
    """
    layers = [int(label.removeprefix("mlp ")) for label in alone]
    prompts = list(zip(*alone.values(), strict=True))  # by prompt, its effects in the order of the layers
    figure = Figure(figsize=(3.6 * min(len(prompts), 3) + 0.4, 2.6 * -(-len(prompts) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(prompts) // 3), min(len(prompts), 3), squeeze=False).flatten()
    for axes, effects in zip(panels, prompts, strict=False):
        whole = effects[0].before
        axes.plot(layers, [effect.after for effect in effects], color="black", marker="o", markersize=3)
        axes.axhline(whole, color="0.4", linestyle="--", linewidth=1)
        axes.set(xlabel="MLP layer zeroed", ylabel=f"P({effects[0].token.strip()})", ylim=(0, None))
        axes.set_title(shortened(effects[0].prompt), fontsize="small")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[len(prompts) :]:
        axes.set_axis_off()
    return save(figure, directory, "mlp-zeroed")


def shortened(text: str, length: int = 44) -> str:
    """A prompt as a title; sequences of the toy are long."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def save_slices(report: RunReport, directory: Path) -> list[Path]:
    """Figure 3: after / before of P(answer) with slices suppressed, dark for their own prompt, light for the others.

    A pair of bars each for the rule's slices of every prompt alone, and for all of them.
    """
    bars = [(row, one) for row, fact in enumerate(report.prompts) for one in fact.slices]
    figure = Figure(figsize=(1.6 + 0.9 * max(3, len(bars)), 3.2), layout="constrained")
    axes = figure.subplots()
    for place, (row, one) in enumerate(bars):
        others = [ratio for number, ratio in enumerate(one.ratio) if number != row]
        axes.bar(place - 0.2, one.ratio[row], 0.36, color="0.15", label="its own prompt" if not place else None)
        for number, ratio in enumerate(others):
            width = 0.36 / len(others)
            at = place + 0.02 + width * (number + 0.5)
            label = "other prompts" if not place and not number else None
            axes.bar(at, ratio, width, color="0.75", edgecolor="0.4", label=label)
    axes.axhline(1, color="0.4", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(bars)), [f"{_tokens(one)}\n{report.prompts[row].answer}" for row, one in bars])
    axes.set(ylabel="P(answer), after / before", ylim=(0, None))
    axes.tick_params(axis="x", labelsize="small")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    return save(figure, directory, "slices")


def save_names(fact: FactReport, row: int, directory: Path, name: str) -> list[Path]:
    """Figure 4: P(answer) of one prompt as it is, without the slice of each token of the name, and without both.

    `fact` is that of the prompt whose number in the report is `row`.
    """
    figure = Figure(figsize=(1.4 + 0.9 * (1 + len(fact.slices)), 2.8), layout="constrained")
    axes = figure.subplots()
    heights = [fact.before, *(one.after[row] for one in fact.slices)]
    bars = axes.bar(range(len(heights)), heights, 0.6, color=["0.15", *["0.65"] * len(fact.slices)])
    axes.margins(y=0.12)  # room for the numbers
    axes.bar_label(bars, [f"{height:.3f}" for height in heights], fontsize="small")
    axes.set_xticks(range(len(heights)), ["nothing", *(_tokens(one) for one in fact.slices)])
    axes.tick_params(axis="x", labelsize="small")
    axes.set(xlabel="slices suppressed", ylabel=f"P({fact.answer.strip()})", ylim=(0, None))
    axes.set_title(shortened(fact.prompt), fontsize="small")
    return save(figure, directory, name)


def _tokens(one: SliceEffect) -> str:
    return " and ".join(f"“{token.strip()}”" for token in one.tokens)
