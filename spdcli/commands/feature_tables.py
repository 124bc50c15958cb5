"""Tables of toys of sparse features."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.edits.feature_ablation import FeatureAblation
    from spdcli.measures.feature_evaluation import FeatureEvaluation

SHOWN = 12  # features of an ablation


def feature_tables(evaluation: FeatureEvaluation) -> list[Table | str]:
    """What a person sees of an evaluation: slices and parts of every matrix, then the losses."""
    from rich.table import Table

    slices = Table(title="Slices that live, and the parts they are")
    heads = ("", "live", "active on data", "on one feature", "features of their own", "max cosine", "L2 ratio")
    for heading in heads:
        slices.add_column(heading, justify="right" if heading else "left")
    for name, live in evaluation.live.items():
        parts, active = evaluation.parts.get(name), evaluation.active[name]
        found = [str(parts.own), _number(parts.mean_max_cosine), _number(parts.l2_ratio)] if parts else [""] * 3
        slices.add_row(name, str(live), f"{active['data']:.2f}", f"{active['single']:.2f}", *found)
    metrics = Table(title=f"Metrics over {evaluation.sequences} inputs")
    for heading in ("", "value", "standard error"):
        metrics.add_column(heading, justify="right" if heading else "left")
    for name, value in evaluation.metrics.items():
        error = evaluation.standard_error[name]
        metrics.add_row(name, f"{value:.1e}", f"{error:.0e}" if error else "exact")
    metrics.add_row("error to the labels, target", f"{evaluation.error.target:.1e}", "")
    metrics.add_row("error to the labels, masked", f"{evaluation.error.masked:.1e}", "")
    return [slices, metrics, f"A slice lives where its importance on one feature is above {evaluation.live_above:g}."]


def ablation_table(lost: FeatureAblation) -> Table:
    """The features that are changed most by what is taken away."""
    from rich.table import Table

    cut = ", ".join([*lost.slices, *lost.zeroed])
    others = f" (others {lost.others})" if lost.others else ""
    table = Table(title=f"Without {cut}{others}: every feature alone, the most changed first")
    for heading in ("feature", "its output before", "after", "another output moves by", "mean squared change"):
        table.add_column(heading, justify="right")
    for one in lost.effects[:SHOWN]:
        table.add_row(
            str(one.feature), f"{one.before:.3f}", f"{one.after:.3f}", f"{one.another:.3f}", f"{one.squared:.1e}"
        )
    return table


def _number(value: float | None) -> str:
    return "none lives" if value is None else f"{value:.3f}"
