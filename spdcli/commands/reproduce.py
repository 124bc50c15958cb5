"""`spd reproduce`: the paper's experiments from recipe to table, and whether they hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spdcli.commands.options import Device, Force, Json, Quiet, Set, Verbose, make_console
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from spdcli.console import Console
    from spdcli.errors import SpdError

Experiment = Annotated[
    Literal["induction", "variants", "facts", "drawn-facts", "planted", "tms", "resid-mlp"],
    typer.Argument(help="What to reproduce.", metavar="induction|variants|facts|drawn-facts|planted|tms|resid-mlp"),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="A recipe file, or a shipped recipe's name; induction-quick, smollm2-facts, smollm2-prompts, or "
        "all of planted, tms or resid-mlp if not given.",
        show_default=False,
    ),
]
PairOption = Annotated[
    list[str] | None,
    typer.Option("--pair", help="Of facts: athletes, painters or landmarks; may be given again.", show_default="all"),
]
Count = Annotated[int, typer.Option("--count", min=2, max=10**4, help="Of drawn-facts: how many.")]
Skip = Annotated[
    int, typer.Option("--skip", min=0, max=10**4, help="Of drawn-facts: pass over so many, which were looked at.")
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="The directory for the seeds' runs and the report.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, max=10**6, help="How many seeds, counted from the recipe's own.")]
SameToy = Annotated[bool, typer.Option("--same-toy", help="Decompose the first seed's toy under every seed.")]
Sequences = Annotated[
    int, typer.Option("--sequences", min=2, max=10**6, help="Fresh toy sequences to measure each seed on.")
]


def reproduce(
    experiment: Experiment,
    recipe: RecipeOption = None,
    out: OutFolder = Path("reproduce"),
    seeds: Seeds = 1,
    same_toy: SameToy = False,
    sequences: Sequences = 8192,
    pair: PairOption = None,
    count: Count = 20,
    skip: Skip = 0,
    set_: Set = None,
    device: Device = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Reproduce one of the paper's experiments, or find slices that are known.

    induction: for every seed toy, decomposition, evaluation, SVD baseline and mechanism, into
    OUT/seed-N, compared with Table 1.

    variants: the induction toy with its position encodings before or after Q and K, with and
    without a begin token and an output projection, side by side, into OUT/VARIANT; no bounds.

    facts: for pairs of facts that a language model knows, decomposition, then suppression of at
    most two slices of the first MLP, into OUT/PAIR/seed-N, beside every baseline.

    drawn-facts: facts that nobody chose, drawn by the recipe's seed and decomposed together into
    OUT/drawn, and how many of them a rule cuts that was settled on others.

    planted: targets put together by hand, decomposed into OUT/TARGET/seed-N, and how much of their
    known slices is found, beside what singular value decompositions find.

    tms, resid-mlp: toys of sparse features whose parts are known, into OUT/RECIPE/seed-N, and
    whether the slices are those parts.

    What is finished is reused while its recipe is the same, so that the same command goes on
    after an interruption. Exit code 1 when fewer than 80 % of the seeds meet every stated bound.
    """
    console = make_console(json, quiet, verbose)
    check_usage(experiment, out, seeds, same_toy, pair)
    common = (list(set_ or []), device, force)
    if experiment == "drawn-facts":
        failure = drawn_facts(console, recipe or "smollm2-prompts", out, count, skip, *common)
    elif experiment in ("tms", "resid-mlp"):
        failure = parts(console, experiment, recipe, out, seeds, sequences, *common)
    elif experiment == "facts":
        failure = facts(console, recipe or "smollm2-facts", out, seeds, pair, *common)
    elif experiment == "variants":
        failure = None
        variants(console, recipe or "induction-quick", out, sequences, *common)
    elif experiment == "planted":
        failure = planted(console, recipe, out, seeds, sequences, *common)
    else:
        failure = induction(console, recipe or "induction-quick", out, seeds, same_toy, sequences, *common)
    console.result(out)
    if failure is not None:
        raise failure


def check_usage(experiment: str, out: Path, seeds: int, same_toy: bool, pair: Sequence[str] | None) -> None:
    """UsageError for an `--out` that is a file, and for options that the experiment does not have."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a directory", "name another with --out")
    if experiment == "variants" and (pair or same_toy or seeds != 1):
        raise UsageError("variants has no --pair, --same-toy or --seeds", "--set seed=1 is another seed")
    if same_toy and experiment != "induction":
        raise UsageError("--same-toy is for the induction experiment")
    if pair and experiment != "facts":
        raise UsageError("--pair is for the facts experiment")


def facts(
    console: Console,
    recipe: str,
    out: Path,
    seeds: int,
    pair: list[str] | None,
    settings: list[str],
    device: str | None,
    force: bool,
) -> SpdError | None:
    """The facts experiment; the failure if there is one."""
    from spdcli.commands.reproduce_tables import fact_tables
    from spdcli.edits.facts_file import load_facts
    from spdcli.paper.fact_claims import PAIRS

    for name in pair or ():
        if name not in PAIRS:
            raise UsageError(f"--pair {name}: expected one of {', '.join(PAIRS)}")
    pairs = {name: PAIRS[name] for name in pair or PAIRS}
    from spdcli.paper.fact_experiment import reproduce_facts
    from spdcli.paper.verdict import SCHEMA
    from spdcli.records import plain

    with console.progress() as report:
        experiment, verdict = reproduce_facts(recipe, out, pairs, load_facts(), seeds, settings, device, force, report)
    console.show({"schema": SCHEMA, **plain(experiment)}, *fact_tables(experiment))
    return verdict.failure()


def drawn_facts(
    console: Console,
    recipe: str,
    out: Path,
    count: int,
    skip: int,
    settings: list[str],
    device: str | None,
    force: bool,
) -> SpdError | None:
    """The facts that are drawn; the failure if there is one."""
    from spdcli.commands.reproduce_tables import drawn_tables
    from spdcli.edits.facts_file import load_facts
    from spdcli.paper.drawn_facts import SCHEMA, reproduce_drawn
    from spdcli.records import plain

    with console.progress() as report:
        experiment = reproduce_drawn(recipe, out, load_facts(), count, skip, settings, device, force, report)
    console.show({"schema": SCHEMA, **plain(experiment)}, *drawn_tables(experiment))
    return experiment.failure()


def variants(
    console: Console,
    recipe: str,
    out: Path,
    sequences: int,
    settings: list[str],
    device: str | None,
    force: bool,
) -> None:
    """The toy's variants, side by side."""
    from spdcli.commands.reproduce_tables import variant_tables
    from spdcli.paper.toy_variants import SCHEMA, toy_variants
    from spdcli.records import plain

    with console.progress() as report:
        experiment = toy_variants(recipe, out, sequences, settings, device, force, report)
    console.show({"schema": SCHEMA, **plain(experiment)}, *variant_tables(experiment))


def parts(
    console: Console,
    experiment: str,
    recipe: str | None,
    out: Path,
    seeds: int,
    inputs: int,
    settings: list[str],
    device: str | None,
    force: bool,
) -> SpdError | None:
    """An experiment on toys whose parts are known; the failure if there is one."""
    from spdcli.commands.reproduce_tables import parts_tables
    from spdcli.paper.parts_experiment import reproduce_parts
    from spdcli.paper.verdict import SCHEMA
    from spdcli.records import plain

    with console.progress() as report:
        outcome, verdict = reproduce_parts(experiment, recipe, out, seeds, inputs, settings, device, force, report)
    console.show({"schema": SCHEMA, **plain(outcome)}, *parts_tables(outcome))
    return verdict.failure("spd eval RUN shows more of a seed")


def induction(
    console: Console,
    recipe: str,
    out: Path,
    seeds: int,
    same_toy: bool,
    sequences: int,
    settings: list[str],
    device: str | None,
    force: bool,
) -> SpdError | None:
    """The induction experiment; the failure if there is one."""
    from spdcli.commands.reproduce_tables import induction_tables
    from spdcli.paper.induction_experiment import reproduce_induction
    from spdcli.paper.verdict import SCHEMA
    from spdcli.records import plain

    with console.progress() as report:
        experiment, verdict = reproduce_induction(
            recipe, out, seeds, same_toy, sequences, settings, device, force, report
        )
    console.show({"schema": SCHEMA, **plain(experiment)}, *induction_tables(experiment))
    return verdict.failure("the bounds are for the full-size task; spd eval RUN shows more of a seed")


def planted(
    console: Console,
    recipe: str | None,
    out: Path,
    seeds: int,
    sequences: int,
    settings: list[str],
    device: str | None,
    force: bool,
) -> SpdError | None:
    """The planted targets; the failure if there is one."""
    from spdcli.commands.reproduce_tables import planted_tables
    from spdcli.paper.planted_experiment import RECIPES, reproduce_planted
    from spdcli.paper.verdict import SCHEMA
    from spdcli.records import plain

    recipes = RECIPES if recipe is None else [recipe]
    with console.progress() as report:
        experiment, verdict = reproduce_planted(recipes, out, seeds, sequences, settings, device, force, report)
    console.show({"schema": SCHEMA, **plain(experiment)}, *planted_tables(experiment))
    return verdict.failure()
