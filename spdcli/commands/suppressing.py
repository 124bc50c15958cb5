"""How `spd suppress` comes to a change: by slices, by a patch or by a script; and how it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdcli.commands.change import ask_facts, ask_questions, mark_active, own_prompts, prompts_only, warn_of_span
from spdcli.console import Console
from spdcli.errors import SpdError

if TYPE_CHECKING:
    from spdcli.edits.answer_changes import AnswerChange
    from spdcli.edits.facts_file import Facts
    from spdcli.edits.known_facts import Collateral
    from spdcli.edits.patches import Weights
    from spdcli.edits.suppression import Edit
    from spdcli.recipe.schema import Recipe
    from spdcli.runs.subject import Subject


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
    from spdcli.edits.answer_changes import measure_edits
    from spdcli.edits.suppression import describe, find_slices, suppression
    from spdcli.runs.loading import load

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
    effects = mark_active(loaded, questions, addresses, measured.pop(""))
    moved, summary = measure_facts(console, given, subject, loaded.recipe, edits[""], seed)
    names = [str(address) for address in addresses]
    matrices = describe(subject.target, decomposition, addresses, edits[""])
    report: dict[str, Any] = {"slices": names, "together": together, "matrices": matrices}
    report |= {"effects": effects + moved, "alone": measured, "facts": summary, "expectations": []}
    return Change(report, subject, base_of(loaded.recipe, given.run), edits[""])


def measure_facts(
    console: Console, given: Given, subject: Subject, recipe: Recipe, edit: Edit, seed: int
) -> tuple[list[AnswerChange], Collateral | None]:
    """The effects of an edit on the facts, and their summary; nothing and None where none are measured."""
    from spdcli.edits.answer_changes import measure_edits

    own = own_prompts(recipe, given.texts)
    asked = ask_facts(console, subject, recipe, given.facts, given.facts_option, own)
    if asked is None:
        return [], None
    effects = measure_edits(subject.target, asked.questions, {"": edit})[""]
    return asked.marked(effects), asked.summary(effects, seed)


def use_patch(console: Console, given: Given, apply: Path | None, revert: Path | None, base: Path | None) -> Change:
    """Apply a patch to a run's target (or `base`), or revert it."""
    from spdcli.edits.answer_changes import measure_edits
    from spdcli.edits.patches import applied, load_patch, negative, reverted
    from spdcli.runs.directory import TOY, RunDirectory
    from spdcli.runs.subject import choose_device, open_subject

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
    report |= {"effects": effects + moved, "alone": {}, "facts": summary, "expectations": []}
    return Change(report, subject, base_of(recipe, given.run), edit, weights)


def write(change: Change, data: dict[str, Any], save: Path | None, patch: Path | None, force: bool) -> None:
    """Write the edited model and the patch, where they are asked for."""
    if save is not None:
        from spdcli.edits.checkpoints import check_destination, save_checkpoint
        from spdcli.edits.patches import edited_weights

        check_destination(save, force, change.base)
        weights = edited_weights(change.subject.target, change.edit) if change.weights is None else change.weights
        save_checkpoint(save, change.subject, weights, data, force)
    if patch is not None:
        from spdcli.edits.patches import make_patch, save_patch

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
    from spdcli.runs.directory import TOY

    if recipe.target.kind == "huggingface":
        return Path(recipe.target.model)
    return Path(recipe.target.path or run / TOY) if recipe.target.kind == "induction" else run
