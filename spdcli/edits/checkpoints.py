"""Writes an edited target as a complete checkpoint that loads without spd."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spdcli.disk import write_directory, write_json
from spdcli.edits.patches import edited_weights, set_weights
from spdcli.edits.suppression import Edit
from spdcli.engine.target import Target
from spdcli.errors import Missing, UsageError
from spdcli.files import save_tensors
from spdcli.recipe.schema import Recipe, ToyTarget
from spdcli.runs.directory import TOY, TOY_WEIGHTS
from spdcli.runs.subject import Subject

MORE_SPACE = "free some space, or name another with --save"
RECORD = "spd_edit.json"  # what was done to the model; it also marks a directory that --force may replace


@contextmanager
def edited(target: Target, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, the target's modules hold `weights` `[I, O]` by matrix; afterwards, exactly what they held before."""
    before = {name: target.matrices[name].stored.detach().clone() for name in weights}
    try:
        set_weights(target, weights)
        yield
    finally:
        set_weights(target, before)


def edited_model(subject: Subject, edit: Edit) -> nn.Module:
    """A copy of the target's model with the edit in its weights, to the bit what `save_checkpoint` writes.

    Of a language model that is a plain transformers model; the target itself is as before.
    """
    with edited(subject.target, edited_weights(subject.target, edit)):
        return copy.deepcopy(subject.target.model)


def recipe_on(recipe: Recipe, base: Path | None) -> Recipe:
    """The recipe with the model in `base` for its target; a toy's place is not in the recipe."""
    if base is None:
        return recipe
    if not base.is_dir():
        raise Missing(f"--base {base}: no such directory", "give a directory that --save wrote, or a checkpoint")
    key = "path" if isinstance(recipe.target, ToyTarget) else "model"
    target = recipe.target.model_copy(update={key: str(base.resolve())})
    return recipe.model_copy(update={"target": target})


def base_of(recipe: Recipe, run: Path) -> Path:
    """The directory that the target of a run came from; a path that does not exist where that is none, as a hub id."""
    if isinstance(recipe.target, ToyTarget):
        return Path(recipe.target.path or run / TOY)
    return Path(recipe.target.model) if recipe.target.kind == "huggingface" else run


def check_destination(path: Path, force: bool, base: Path | None = None) -> None:
    """UsageError unless a checkpoint may be written to `path`: it is new, empty, or an earlier one and `force`.

    `force` replaces only what `save_checkpoint` wrote, and never the `base` that the edit starts from.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, not a directory", "name another with --save")
    if base is not None and path.resolve() == base.resolve():
        raise UsageError(f"{path} is the base itself", "name another with --save")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / RECORD).exists():
        raise UsageError(f"{path} is not empty and holds no edited model", "name another with --save")
    if not force:
        raise UsageError(f"{path} holds another edited model", "--force replaces it, or name another with --save")


def save_checkpoint(
    path: Path, subject: Subject, weights: Mapping[str, Tensor], record: Mapping[str, Any], force: bool = False
) -> None:
    """Write the target with `weights` in place of its own, and `record`, to the directory `path`, whole or not at all.

    A language model becomes a Hugging Face checkpoint with its tokenizer, in the precision that the run holds it in;
    the toy a `target.safetensors`, as `target.path` of a recipe names it. The target itself is as before afterwards.
    """
    check_destination(path, force)

    def write(beside: Path) -> None:
        with edited(subject.target, weights):
            if subject.trained_toy is not None:
                save_tensors(beside / TOY_WEIGHTS, subject.trained_toy.state_dict())
            else:
                _save_language_model(subject, beside)
        write_json(beside / RECORD, record)

    write_directory(path, write, MORE_SPACE)


def _save_language_model(subject: Subject, folder: Path) -> None:
    from spdcli.targets.quiet import quiet

    assert subject.prompts is not None
    model: Any = subject.target.model
    with quiet():
        model.save_pretrained(folder)
        subject.prompts.tokenizer.save_pretrained(folder)
