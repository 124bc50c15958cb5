"""What `spd reproduce` prints: tables of the experiments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from spdcli.engine.tables import GRADES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from spdcli.paper.drawn_facts import DrawnExperiment
    from spdcli.paper.fact_claims import MethodRow, Range
    from spdcli.paper.fact_experiment import FactExperiment
    from spdcli.paper.induction_experiment import InductionExperiment
    from spdcli.paper.parts_experiment import PartsExperiment
    from spdcli.paper.planted_experiment import PlantedExperiment
    from spdcli.paper.toy_variants import ToyVariants
    from spdcli.paper.verdict import ClaimRow

LEGEND = "own, median and mean: means over seeds (own: least and largest too); other prompt and max: the largest."
RECOVERY_NUMBERS = ("precision", "recall", "cosine", "missing", "idle")
RECOVERY_LEGEND = (
    "precision and recall of slices matched at a cosine of 0.95; cosine: mean over planted slices; missing: positions "
    "where a needed slice is off; idle: where a slice is on for nothing. Both only of methods that say where."
)
NAMES = {
    "rule": "SPD, by rule",
    "all of it": "the same slices, in full",
    "projection": "the same slices, projected",
    "effect": "SPD, by effect",
    "static": "static duals, whitened",
    "static_plain": "static duals",
    "direct": "direct, C⁻¹x",
    "optimised": "optimised (no location)",
    "random": "random, same norm",
    "singular": "top singular",
}


def induction_tables(experiment: InductionExperiment) -> list[Table | str]:
    """Ours beside the paper's (Table 1), then seed by seed."""
    parts: list[Table | str] = [
        claim_table("Table 1", experiment.rows, len(experiment.seeds)),
        "Bounds in brackets are not stated ones: they say what counts as agreeing.",
    ]
    for seed in experiment.seeds:
        ranks = ", ".join(f"{name} {'never' if r is None else f'{r:.4g}'}" for name, r in seed.svd.rank.items())
        verdict = (
            "meets every bound" if seed.passed else f"breaks {len(seed.broken)} bound{'s' * (len(seed.broken) > 1)}"
        )
        parts.append(f"seed {seed.seed} {verdict}; rank left at a KL of {seed.svd.tolerance:g}: {ranks}")
    if experiment.stability is not None:
        means = ", ".join(f"{name} {one.mean:.2f}" for name, one in experiment.stability.matrices.items())
        parts.append(
            f"mean similarity of a slice to its match in other seeds, by {experiment.stability.definition}: {means}"
        )
    return parts


def parts_tables(experiment: PartsExperiment) -> list[Table | str]:
    """Ours beside the published numbers, then seed by seed."""
    seeds = len(experiment.seeds) // len(experiment.recipes)
    parts: list[Table | str] = [claim_table("Known parts", experiment.rows, seeds), parts_methods(experiment)]
    for seed in experiment.seeds:
        broken = [name.removeprefix(f"{seed.recipe}: ") for name in seed.broken]
        verdict = "meets every bound" if seed.passed else f"breaks {' and '.join(broken)}"
        own = ", ".join(f"{count} in {name}" for name, count in seed.own.items())
        parts.append(f"{seed.recipe}, seed {seed.seed}, {verdict}; features with a slice of their own: {own}")
    return parts


def parts_methods(experiment: PartsExperiment) -> Table:
    """What other methods find of the parts, a row a recipe, matrix and method: means over seeds."""
    from rich.table import Table

    table = Table(title="What other methods find of the parts")
    for heading in ("recipe", "matrix", "method", "max cosine", "L2 ratio", "features with a slice of their own"):
        table.add_column(heading, justify="left" if heading in ("recipe", "matrix", "method") else "right")
    for row in experiment.methods:
        numbers = ["none" if value is None else number(value) for value in (row.mean_max_cosine, row.l2_ratio)]
        table.add_row(row.recipe, row.matrix, row.method, *numbers, number(row.own))
    return table


def claim_table(title: str, rows: Sequence[ClaimRow], seeds: int) -> Table:
    """Ours and the paper's, a row a claim; of several seeds with their spread."""
    from rich.table import Table

    several = seeds > 1
    table = Table(title=f"{title}: ours{', mean of ' + str(seeds) + ' seeds' if several else ''}, and the paper's")
    headings = ["", "evidence", "ours", *(["spread", "least", "most"] if several else []), "paper", "bound", "agrees"]
    for heading in [*headings, *(["seeds"] if several else [])]:
        table.add_column(heading, justify="left" if heading in ("", "evidence") else "right")
    for row in rows:
        spread = [number(value) for value in (row.spread.std, row.spread.min, row.spread.max)] if row.spread else []
        share = [f"{row.share:.0%}"] if several else []
        paper = "" if row.paper is None else number(row.paper)
        agrees = "yes" if row.agrees else "NO"
        graded = GRADES[row.grade].label if row.grade else ""
        table.add_row(row.name, graded, number(row.ours), *spread, paper, bound_text(row), agrees, *share)
    return table


def fact_tables(experiment: FactExperiment) -> list[Table | str]:
    """One table a prompt with every method, then the bounds."""
    from rich.table import Table

    several = len(experiment.seeds) > 1
    by_prompt: dict[str, list[MethodRow]] = {}
    for row in experiment.methods:
        by_prompt.setdefault(row.prompt, []).append(row)
    parts: list[Table | str] = [method_table(prompt, rows, several) for prompt, rows in by_prompt.items()]
    bounds = Table(title="Bounds (in brackets: not stated ones)")
    for heading in ("", "ours", "bound", "holds on"):
        bounds.add_column(heading, justify="right" if heading else "left")
    for claim in experiment.rows:
        ours = "no slice" if math.isnan(claim.ours) else f"{claim.ours:+.1%}"
        bounds.add_row(claim.name, ours, bound_text(claim), f"{claim.share:.0%} of seeds")
    return [*parts, LEGEND, bounds]


def drawn_tables(experiment: DrawnExperiment) -> list[Table | str]:
    """How many facts each method cuts, then what the edit by rule does to each."""
    from rich.table import Table

    total = len(experiment.facts)
    counts = Table(title=f"{total} drawn facts: cut by 60 %, and cut with every bound on others held")
    for heading in ("method", "edits", "cut", "cut, others spared", "and the tail"):
        counts.add_column(heading, justify="left" if heading == "method" else "right")
    for row in experiment.methods:
        spared = f"{row.cut_and_spared} ({row.cut_and_spared / total:.0%})"
        counts.add_row(NAMES[row.method], str(row.edits), str(row.cut), spared, str(row.cut_and_tail_spared))
    each = Table(title="By rule: relative changes, of other facts the mean, the 99th percentile and the largest")
    for heading in (
        "fact",
        "slices",
        "its own",
        "prompts",
        "mean",
        "99 %",
        "max",
        "same subject",
        "text KL 99 %",
        "holds",
    ):
        each.add_column(heading, justify="left" if heading == "fact" else "right")
    for fact in experiment.facts:
        rule = fact.edits.get("rule")
        if rule is None:
            each.add_row(fact.prompt, "0", *["–"] * 7, "no")
            continue
        known = [share(value) for value in (rule.known.mean, rule.known.p99, rule.known.max)]
        text = "–" if rule.text is None else number(rule.text.kl_p99)
        holds = "yes" if rule.cut and rule.spares else "no"
        count = str(len(rule.slices or ()))
        each.add_row(
            fact.prompt, count, f"{rule.own:+.0%}", share(rule.others.max), *known, share(rule.akin.max), text, holds
        )
    return [counts, each]


def share(value: float | None) -> str:
    """A relative change, or a dash where nothing was asked."""
    return "–" if value is None else f"{value:.1%}"


def variant_tables(experiment: ToyVariants) -> list[Table]:
    """What every variant's target does, then Table 1 of its decomposition."""
    from rich.table import Table

    target = Table(title="The toy's variants: attention, and the largest singular values of W")
    ours = Table(title="Their decompositions: unique slices, and in brackets active ones where the paper has them")
    for table, headings in (
        (target, ("accuracy", "m to s1", "query unplaced", "s2 to m", "Q0", "K0", "without Q0 at m")),
        (ours, (*experiment.variants[0].active, "recon", "layerwise")),
    ):
        for heading in ("variant", *headings):
            table.add_column(heading, justify="left" if heading == "variant" else "right")
    for one in experiment.variants:
        name = one.positions + ", begin" * one.begin_token + ", output" * one.output_projection
        attention = [number(value) for value in (one.m_to_s1, one.m_to_s1_unplaced_query, one.s2_to_m)]
        values = [" ".join(f"{value:.2g}" for value in one.singular_values[matrix]) for matrix in ("Q0", "K0")]
        target.add_row(name, f"{one.accuracy:.2%}", *attention, *values, number(one.needs["Q0"]))
        counts = [f"{one.unique[matrix]} ({value:.2g})" for matrix, value in one.active.items()]
        ours.add_row(name, *counts, number(one.metrics["recon"]), number(one.metrics["recon_layerwise"]))
    return [target, ours]


def method_table(prompt: str, rows: list[MethodRow], several: bool) -> Table:
    """What every method's edit does to one prompt's answer, to the other prompt and to the known facts."""
    from rich.table import Table

    table = Table(title=f"{prompt.removesuffix(rows[0].token)} …{rows[0].token}: relative changes")
    table.add_column("edit", no_wrap=True)
    for heading in ("own answer", "other", "facts: median", "mean", "max"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            NAMES[row.method],
            range_text(row.own, several, "+.0%"),
            f"{row.others.max:.1%}",
            f"{row.median_relative_change.mean:.1%}",
            f"{row.mean_relative_change.mean:.1%}",
            f"{row.max_relative_change.max:.0%}",
        )
    return table


def planted_tables(experiment: PlantedExperiment) -> list[Table | str]:
    """What each method finds of the planted slices, then the bounds."""
    from rich.table import Table

    found = Table(title="Planted slices, means over seeds", caption=RECOVERY_LEGEND)
    for heading in ("target", "method", *RECOVERY_NUMBERS):
        found.add_column(heading, justify="left" if heading in ("target", "method") else "right")
    for row in experiment.recovery:
        found.add_row(row.target, row.method, *(_share(row.recovery[key]) for key in RECOVERY_NUMBERS))
    bounds = Table(title="Bounds of SPD's (in brackets: not stated ones)")
    for heading in ("", "ours", "bound", "holds on"):
        bounds.add_column(heading, justify="right" if heading else "left")
    for claim in experiment.rows:
        bounds.add_row(claim.name, number(claim.ours), bound_text(claim), f"{claim.share:.0%} of seeds")
    return [found, bounds]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def bound_text(row: ClaimRow) -> str:
    """A stated bound, or in brackets what counts as agreeing."""
    return row.bound or f"({row.agreement})"


def range_text(values: Range, several: bool, form: str) -> str:
    """A mean, and of several seeds the least and the largest value."""
    mean = format(values.mean, form)
    return f"{mean} ({format(values.min, form)} to {format(values.max, form)})" if several else mean


def number(value: float) -> str:
    """Three decimals, or an exponent where they would say nothing."""
    return f"{value:.3f}".rstrip("0").rstrip(".") if value == 0 or abs(value) >= 1e-2 else f"{value:.1e}"
