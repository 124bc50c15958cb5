"""`spd suppress`: takes slices' directions out of the original weights, as a checkpoint or as a patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spdcli.commands.edit_options import (
    Answer,
    FactsOption,
    KeptText,
    NoFacts,
    Prompt,
    Sequences,
    SliceAddress,
    TextTokens,
    exam_options,
)
from spdcli.commands.edit_outcomes import Outcome, RunOptions, suppress_script, suppress_slices, use_patch, write
from spdcli.commands.effect_tables import (
    alone_table,
    effects_table,
    facts_tables,
    in_title,
    prompts_only,
    quiet_lines,
    scores_tables,
    text_tables,
)
from spdcli.commands.options import Device, Force, Json, Quiet, RunPath, Seed, Verbose, make_console
from spdcli.commands.script import check_script, script_tables, verdict_lines
from spdcli.console import Console
from spdcli.edits.choices import TOGETHER, USUAL_TOGETHER, in_words
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.edits.edit_reports import PatchReport, SuppressionReport
    from spdcli.edits.suppression import MatrixCut

    Together = str
else:
    Together = Literal[tuple(TOGETHER)]

TogetherOption = Annotated[
    Together | None,
    typer.Option(
        "--together", help=f"Several slices of one matrix: {in_words(TOGETHER)}.", show_default=USUAL_TOGETHER
    ),
]
Strength = Annotated[
    float | None,
    typer.Option("--strength", min=0.001, max=10, help="How much of that is taken.", show_default="1, all"),
]
Save = Annotated[
    Path | None, typer.Option("--save", help="Write the edited model to this directory.", show_default=False)
]
PatchFile = Annotated[
    Path | None, typer.Option("--patch", help="Write the edit alone to this file.", show_default=False)
]
Apply = Annotated[Path | None, typer.Option("--apply", help="Apply this patch, instead of slices.", show_default=False)]
Revert = Annotated[
    Path | None, typer.Option("--revert", help="Take this patch off a base that has it.", show_default=False)
]
Base = Annotated[
    Path | None,
    typer.Option("--base", help="A checkpoint directory to patch, instead of the run's target.", show_default=False),
]
ScriptFile = Annotated[
    Path | None,
    typer.Option("--script", help="Named edits with what is expected of each, as TOML.", show_default=False),
]
CounterFact = Annotated[
    Path | None,
    typer.Option(
        "--counterfact",
        help="Score the edit on records in CounterFact's format too: JSON, a list or a record a line.",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Find what a script edits, and do nothing.")]


def suppress(
    run: RunPath,
    slice: SliceAddress = None,
    together: TogetherOption = None,
    strength: Strength = None,
    script: ScriptFile = None,
    dry_run: DryRun = False,
    prompt: Prompt = None,
    answer: Answer = None,
    facts: FactsOption = None,
    no_facts: NoFacts = False,
    counterfact: CounterFact = None,
    text: KeptText = None,
    text_tokens: TextTokens = 100_000,
    save: Save = None,
    patch: PatchFile = None,
    apply: Apply = None,
    revert: Revert = None,
    base: Base = None,
    force: Force = False,
    sequences: Sequences = 16,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Suppress slices in the original model: W loses its projection on each slice's direction.

    W ← W − Σ (ûᵀ W v̂) û v̂ᵀ. Of several slices of one matrix, every projection is
    that of the original W (literal, as in the paper), or they are made orthonormal
    first, or go in sequence; or the slices go as they stand (whole, W - U V). How
    far these are apart is reported.

    --script reads edits and what is expected of them from a file; every edit is
    measured on its own, from the original weights, and exit code 1 says that an
    expectation failed. Nothing is written then.

    Efficacy, paraphrase and specificity are those of papers on editing: shares of
    prompts whose answer is lost (of the edited prompts, those the slices are active
    in, and of their paraphrases among the facts) or kept (of the others).

    --save writes a checkpoint that transformers loads unaided. --patch writes the
    edit alone; --apply and --revert put it on or take it off again, bit for bit.
    """
    console = make_console(json, quiet, verbose)
    instead = {"--slice": slice, "--together": together, "--strength": strength, "--prompt": prompt, "--answer": answer}
    outputs = {"--patch": patch, "--save": save}
    check_usage(instead, script, dry_run, {"--apply": apply, "--revert": revert}, base, outputs)
    check_outputs(patch, save, force)
    kept = None if text is None else (text, text_tokens)
    exam = exam_options(prompt, answer, facts, no_facts, sequences, counterfact=counterfact, text=kept)
    options = RunOptions(run, device, seed, exam)
    if script is not None:
        sections = check_script(script, "--save" if save else "--patch" if patch else None, no_facts)
        outcome = suppress_script(console, options, sections, dry_run)
    elif slice:
        outcome = suppress_slices(console, options, slice, together or USUAL_TOGETHER, strength or 1.0)
    else:
        outcome = use_patch(console, options, apply, revert, base)
    conclude(console, run, outcome, save, patch, apply or revert, dry_run, force)


def conclude(
    console: Console,
    run: Path,
    outcome: Outcome,
    save: Path | None,
    patch: Path | None,
    patch_read: Path | None,
    dry_run: bool,
    force: bool,
) -> None:
    """Write the edit and show the report; if an expectation failed, nothing is written, and the exit code is 1."""
    from spdcli.records import plain

    expectations = outcome.report.expectations
    failures = sum(one.passed is False for one in expectations)
    if dry_run or failures:
        save = patch = None
    files = {"saved": save, "patch": patch or patch_read}
    data = {"schema": "spd.suppress/1", "run": str(run), **plain(outcome.report), **plain(files)}
    write(outcome, data, save, patch, force)
    show(console, outcome.report, data, [path for path in (patch, save) if path is not None])
    if failures:
        console.note(f"{failures} of {len(expectations)} expectations failed")
        raise typer.Exit(1)


def show(
    console: Console, report: SuppressionReport | PatchReport, data: Mapping[str, Any], paths: Sequence[Path]
) -> None:
    """The report, then what was written, or with `-q` the verdicts of a script, or the effects."""
    from spdcli.edits.expectations import ScriptReport

    console.show(data, *tables(report, console.verbose))
    for path in paths:
        console.result(path)
    if isinstance(report, ScriptReport):
        verdict_lines(console, report.expectations)
    elif not paths:
        quiet_lines(console, report.effects)


def check_usage(
    slices: Mapping[str, Any],
    script: Path | None,
    dry_run: bool,
    patches: Mapping[str, Path | None],
    base: Path | None,
    outputs: Mapping[str, Path | None],
) -> None:
    """UsageError for options that contradict each other: an edit comes from slices, a script or a patch."""
    from_patch = [option for option, value in patches.items() if value is not None]
    if len(from_patch) > 1:
        raise UsageError("--apply and --revert contradict each other", "give one of the two")
    if dry_run and script is None:
        raise UsageError("--dry-run is for --script FILE")
    if not (slices["--slice"] or script or from_patch):
        raise UsageError("nothing to suppress", "give --slice ADDRESS, --script FILE, --apply FILE or --revert FILE")
    if script is not None:
        for option in [name for name, value in {**slices, **patches}.items() if value]:
            raise UsageError(f"--script and {option} contradict each other: the script says it")
    if base is not None and not from_patch:
        raise UsageError("--base is what --apply or --revert works on; a run's slices are those of its own target")
    if from_patch:
        for option in ("--slice", "--together", "--strength", "--patch"):
            if slices.get(option) or outputs.get(option):
                raise UsageError(f"{from_patch[0]} and {option} contradict each other: the patch says what to change")


def check_outputs(patch: Path | None, save: Path | None, force: bool) -> None:
    """UsageError for what is in the way of what will be written, before anything is loaded."""
    if patch is not None and patch.exists() and not force:
        raise UsageError(f"{patch} is there already", "--force replaces it, or name another with --patch")
    if save is not None and save.exists():
        from spdcli.edits.checkpoints import check_destination

        check_destination(save, force)


def tables(report: SuppressionReport | PatchReport, verbose: bool) -> list[RenderableType]:
    """The effects, each slice's own, what becomes of the facts, and what every matrix loses; of a script its own."""
    from spdcli.edits.edit_reports import PatchReport
    from spdcli.edits.expectations import ScriptReport

    if isinstance(report, ScriptReport):
        return script_tables(report, verbose)
    verb = (
        {"apply": "Patched", "revert": "Reverted"}[report.action] if isinstance(report, PatchReport) else "Suppressed"
    )
    title = f"{verb}: {in_title(report.slices)}"
    parts = [effects_table(title, prompts_only(report.effects)), *alone_table(report.alone)]
    parts += [*facts_tables(report.facts, report.effects, verbose), *scores_tables(report.scores)]
    parts += text_tables({"this": report.text})
    return parts if isinstance(report, PatchReport) else [*parts, cuts_table(report.matrices, report.together or "")]


def cuts_table(cuts: Sequence[MatrixCut], together: str) -> RenderableType:
    """A row a matrix: what every form of the edit removes, and how far it is from the literal one."""
    from rich.table import Table

    table = Table(title=f"Taken from the weights, in shares of ‖W‖ (Frobenius); done: {together}")
    table.add_column("matrix", overflow="fold")
    for heading in ("slices", *(form if form == "literal" else f"{form}\n(from literal)" for form in TOGETHER)):
        table.add_column(heading, justify="right")
    for cut in cuts:
        apart = {form: "" if form == "literal" else f"\n({cut.forms[form].from_literal:.2e})" for form in TOGETHER}
        removed = (f"{cut.forms[form].removed:.4%}{apart[form]}" for form in TOGETHER)
        table.add_row(cut.matrix, f"{len(cut.slices)}", *removed)
    return table
