"""`spd suppress`: takes slices' directions out of the original weights, as a checkpoint or as a patch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spdcli.commands.change import (
    FactsOption,
    NoFacts,
    Prompt,
    Sequences,
    SliceAddress,
    alone_table,
    ask_facts,
    ask_questions,
    effects_table,
    facts_tables,
    listed,
    mark_active,
    prompts_only,
    quiet_lines,
    read_facts,
    read_prompts,
    warn_of_span,
)
from spdcli.commands.options import Device, Force, Json, Quiet, RunPath, Seed, Verbose, make_console
from spdcli.console import Console
from spdcli.errors import SpdError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.analysis.edits import Edit
    from spdcli.analysis.patches import Weights
    from spdcli.facts import Facts
    from spdcli.recipe import Recipe
    from spdcli.subject import Subject


class Together(StrEnum):
    """The ways of `analysis.edits.TOGETHER`, without importing it."""

    orthonormal = "orthonormal"
    sequence = "sequence"


TogetherOption = Annotated[
    Together | None,
    typer.Option(
        "--together",
        help="Several slices of one matrix: at once, in any order, or one after the other.",
        show_default="orthonormal",
    ),
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


def suppress(
    run: RunPath,
    slice: SliceAddress = None,
    together: TogetherOption = None,
    prompt: Prompt = None,
    facts: FactsOption = None,
    no_facts: NoFacts = False,
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

    W ← W − (ûᵀ W v̂) û v̂ᵀ. Of several slices of one matrix, the projection on
    all their directions goes at once (orthonormal), whatever their order, or one
    after the other (sequence); how far the two are apart is reported.

    --save writes a checkpoint that transformers loads unaided. --patch writes the
    edit alone; --apply and --revert put it on or take it off again, bit for bit.
    """
    console = make_console(json, quiet, verbose)
    check_usage(slice, together, save, patch, apply, revert, base, force)
    given = Given(run, read_prompts(prompt), read_facts(facts, no_facts), facts, sequences, device, seed)
    if slice:
        change = suppress_slices(console, given, slice, (together or Together.orthonormal).value)
    else:
        change = use_patch(console, given, apply, revert, base)
    data = {"schema": "spd.suppress/1", "run": str(run), **change.report, "expectations": []}
    data |= {"saved": save, "patch": patch or apply or revert}
    write(change, data, save, patch, force)
    console.show(data, *render(data, verbose))
    for path in (patch, save):
        if path is not None:
            console.result(path)
    if save is None and patch is None:
        quiet_lines(console, data["effects"])


def check_usage(
    slices: list[str] | None,
    together: Together | None,
    save: Path | None,
    patch: Path | None,
    apply: Path | None,
    revert: Path | None,
    base: Path | None,
    force: bool,
) -> None:
    """UsageError for options that contradict each other, before anything is loaded."""
    from_patch = "--apply" if apply is not None else "--revert"
    if apply is not None and revert is not None:
        raise UsageError("--apply and --revert contradict each other", "give one of the two")
    if apply is None and revert is None:
        if not slices:
            raise UsageError("nothing to suppress", "give --slice ADDRESS, or --apply FILE or --revert FILE")
        if base is not None:
            raise UsageError("--base is what --apply or --revert works on; a run's slices are those of its own target")
    else:
        extra = [("--slice", slices), ("--together", together), ("--patch", patch)]
        for option, value in extra:
            if value:
                raise UsageError(f"{from_patch} and {option} contradict each other: the patch says what to change")
    if patch is not None and patch.exists() and not force:
        raise UsageError(f"{patch} is there already", "--force replaces it, or name another with --patch")
    if save is not None and save.exists():
        from spdcli.analysis.checkpoints import check_destination

        check_destination(save, force)


@dataclass(frozen=True)
class Given:
    """What both ways to change a model are given."""

    run: Path
    texts: list[str]
    facts: Facts | None
    facts_option: str | None
    sequences: int
    device: str | None
    seed: int | None


@dataclass(frozen=True, eq=False)
class Change:
    """What both give back: the report, the edit of the subject's target, and its weights afterwards if known yet."""

    report: dict[str, Any]
    subject: Subject
    base: Path
    edit: Edit
    weights: Weights | None = None


def suppress_slices(console: Console, given: Given, slices: list[str], together: str) -> Change:
    """Suppress a run's slices."""
    from spdcli.analysis.edits import describe, find_slices, suppression
    from spdcli.analysis.effects import measure_edits
    from spdcli.loading import load

    loaded = load(given.run, given.device)
    console.debug(str(loaded))
    subject, decomposition = loaded.subject, loaded.decomposition
    addresses = find_slices(decomposition, slices)
    seed = loaded.recipe.seed if given.seed is None else given.seed
    questions = ask_questions(subject, loaded.recipe, given.texts, given.sequences, seed)
    edits = {"": suppression(subject.target, decomposition, addresses, together)}
    if len(addresses) > 1:
        edits |= {str(one): suppression(subject.target, decomposition, [one]) for one in addresses}
    measured = measure_edits(subject.target, questions, edits)
    warn_of_span(console, loaded.recipe, given.texts)
    effects = measured.pop("")
    mark_active(loaded, questions, addresses, effects)
    moved, summary = measure_facts(console, given, subject, loaded.recipe, edits[""], seed)
    names = [str(address) for address in addresses]
    matrices = describe(subject.target, decomposition, addresses, edits[""])
    report: dict[str, Any] = {"slices": names, "together": together, "matrices": matrices}
    report |= {"effects": effects + moved, "alone": measured, "facts": summary}
    return Change(report, subject, base_of(loaded.recipe, given.run), edits[""])


def measure_facts(
    console: Console, given: Given, subject: Subject, recipe: Recipe, edit: Edit, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The effects of an edit on the facts, and their summary; nothing and None where none are measured."""
    from spdcli.analysis.effects import measure_edits

    asked = ask_facts(console, subject, recipe, given.facts, given.facts_option, given.texts)
    if asked is None:
        return [], None
    effects = measure_edits(subject.target, asked.questions, {"": edit})[""]
    return effects, asked.summary(effects, seed)


def use_patch(console: Console, given: Given, apply: Path | None, revert: Path | None, base: Path | None) -> Change:
    """Apply a patch to a run's target (or `base`), or revert it."""
    from spdcli.analysis.effects import measure_edits
    from spdcli.analysis.patches import applied, load_patch, negative, reverted
    from spdcli.runs import TOY, RunDirectory
    from spdcli.subject import choose_device, open_subject

    path = apply or revert
    assert path is not None
    made = load_patch(path)
    directory = RunDirectory.open(given.run)
    recipe = based_on(directory.recipe, base)
    subject = open_subject(recipe, choose_device(given.device or recipe.device), base or directory / TOY)
    weights = applied(subject.target, made, path) if apply else reverted(subject.target, made, path)
    edit = made.edit if apply else {name: negative(factors) for name, factors in made.edit.items()}
    seed = recipe.seed if given.seed is None else given.seed
    questions = ask_questions(subject, recipe, given.texts, given.sequences, seed)
    effects = measure_edits(subject.target, questions, {"": edit})[""]
    moved, summary = measure_facts(console, given, subject, recipe, edit, seed)
    report = {"slices": made.about["slices"], "action": "apply" if apply else "revert"}
    report |= {"effects": effects + moved, "alone": {}, "facts": summary}
    return Change(report, subject, base_of(recipe, given.run), edit, weights)


def write(change: Change, data: dict[str, Any], save: Path | None, patch: Path | None, force: bool) -> None:
    """Write the edited model and the patch, where they are asked for."""
    if save is not None:
        from spdcli.analysis.checkpoints import check_destination, save_checkpoint
        from spdcli.analysis.patches import edited_weights

        check_destination(save, force, change.base)
        weights = edited_weights(change.subject.target, change.edit) if change.weights is None else change.weights
        save_checkpoint(save, change.subject, weights, data, force)
    if patch is not None:
        from spdcli.analysis.patches import make_patch, save_patch

        evidence = {key: data[key] for key in ("together", "matrices", "facts")}
        evidence["effects"] = prompts_only(data["effects"])
        save_patch(patch, make_patch(change.subject.target, change.edit, data["slices"], evidence))


def based_on(recipe: Recipe, base: Path | None) -> Recipe:
    """The recipe with the model in `base` for its target; a toy's place is not in the recipe."""
    if base is None:
        return recipe
    if not base.is_dir():
        raise SpdError(f"--base {base}: no such directory", "give a directory that --save wrote, or a checkpoint")
    key = "path" if recipe.target.kind == "induction" else "model"
    target = recipe.target.model_copy(update={key: str(base.resolve())})
    return recipe.model_copy(update={"target": target})


def base_of(recipe: Recipe, run: Path) -> Path:
    """The directory that the target came from; a path that does not exist where it is none, as for a hub id."""
    from spdcli.runs import TOY

    return Path(recipe.target.path or run / TOY) if recipe.target.kind == "induction" else Path(recipe.target.model)


def render(data: dict[str, Any], verbose: bool) -> list[RenderableType]:
    """The effects, each slice's own, what becomes of the facts, and what every matrix loses."""
    from rich.table import Table

    verb = {"apply": "Patched: ", "revert": "Reverted: "}.get(data.get("action", ""), "Suppressed: ")
    parts = [effects_table(verb + listed(data["slices"]), prompts_only(data["effects"])), *alone_table(data["alone"])]
    parts += facts_tables(data["facts"], data["effects"], verbose)
    if "matrices" not in data:
        return parts
    table = Table(title="Taken from the weights (Frobenius norms, as shares of ‖W‖)")
    for name in ("matrix", "slices", "removed", "orthonormal and sequence differ by"):
        table.add_column(name, justify="left" if name == "matrix" else "right")
    for row in data["matrices"]:
        table.add_row(row["matrix"], f"{len(row['slices'])}", f"{row['removed']:.4%}", f"{row['difference']:.2e}")
    return [*parts, table]
