"""A finished run with everything that the commands and Python use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import Missing, UsageError
from spdcli.recipe.schema import Recipe
from spdcli.runs.decomposition import read_decomposition
from spdcli.runs.directory import DECOMPOSITION, TOY, TOY_WEIGHTS, RunDirectory
from spdcli.runs.opening import can_go_on
from spdcli.runs.subject import Subject, choose_device, open_subject


@dataclass(frozen=True, eq=False, repr=False)
class LoadedRun:
    """A run: its recipe, subject (target, data, names of tokens) and decomposition; its directory unless in memory."""

    directory: RunDirectory | None
    recipe: Recipe
    subject: Subject
    decomposition: Decomposition

    @property
    def home(self) -> RunDirectory:
        """The run directory; UsageError for a run in memory."""
        if self.directory is None:
            raise UsageError("this run is kept in memory and has no directory", "run.save(path) gives it one")
        return self.directory

    @property
    def begin_token(self) -> bool:
        """Whether the run's prompts begin with the tokenizer's begin-of-sequence token."""
        return self.subject.prompts is not None and self.subject.prompts.begin_token

    def seed_or(self, seed: int | None) -> int:
        """`seed` where one is given, else the recipe's."""
        return seed_or(self.recipe, seed)

    def __str__(self) -> str:
        names, device = self.decomposition.names, self.subject.target.device
        slices = sum(self.decomposition.of(name).U.shape[1] for name in names)
        return f"{self.directory or 'in memory'}: {len(names)} matrices, {slices} slices, on {device}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"


def seed_or(recipe: Recipe, seed: int | None) -> int:
    """`seed` where one is given, else the recipe's."""
    return recipe.seed if seed is None else seed


def load(
    path: str | Path, device: str | None = None, open_target: Callable[[Recipe], Subject] | None = None
) -> LoadedRun:
    """Open the run at `path`; SpdError when there is none or it has no decomposition yet.

    `device` is auto, cpu or cuda; the recipe's own when left out. `open_target` gives the subject of the run's recipe
    where the recipe alone does not (a module of somebody's own).
    """
    directory = RunDirectory.open(Path(path))
    recipe = directory.recipe
    if (directory / TOY_WEIGHTS).exists():
        raise Missing(
            f"{path} holds a trained toy and no decomposition",
            f"spd decompose RECIPE --set target.path={path} takes it apart",
        )
    if not (directory / DECOMPOSITION).exists():
        how = "--resume goes on with it" if can_go_on(directory) else "--force begins it anew"
        raise Missing(
            f"{directory} is not finished: there is no {DECOMPOSITION}",
            f"{directory.command} {how}",
        )
    if open_target is not None:
        subject = open_target(recipe)
    else:
        subject = open_subject(recipe, choose_device(device or recipe.device), directory / TOY)
    decomposition = read_decomposition(directory / DECOMPOSITION, recipe, subject, directory.way_back)
    return LoadedRun(directory, recipe, subject, decomposition)
