"""A run is read from anywhere: the local paths of its recipe are absolute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spdcli.recipe.choices import TOYS
from spdcli.recipe.schema import GENERATED, Recipe
from spdcli.recipe.section import Section
from spdcli.targets.model_files import is_local


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with its local paths made absolute, so that a run can be read from any directory."""
    changes: dict[str, Any] = {}
    if recipe.target.kind in TOYS:
        changes["target"] = _anchored_key(recipe.target, "path")
    elif recipe.target.kind == "huggingface" and is_local(recipe.target.model):
        changes["target"] = _anchored_key(recipe.target, "model")
    if recipe.data is not None:
        changes["data"] = _anchored_key(recipe.data, "stream")
    return recipe.model_copy(update=changes)


def _anchored_key(section: Section, key: str) -> Section:
    place = getattr(section, key)
    if place in (None, GENERATED) or not Path(place).expanduser().exists():
        return section
    return section.model_copy(update={key: str(Path(place).expanduser().resolve())})
