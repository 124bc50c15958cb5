"""`spdcli.load`: a finished run with everything the commands use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import SpdError
from spdcli.files import load_tensors
from spdcli.recipe.schema import Recipe
from spdcli.runs.decomposition import load_decomposition
from spdcli.runs.directory import DECOMPOSITION, TOY, TOY_WEIGHTS, RunDirectory
from spdcli.runs.subject import Subject, choose_device, open_subject


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A run: its directory, recipe, subject (target, data, names of tokens) and decomposition."""

    directory: RunDirectory
    recipe: Recipe
    subject: Subject
    decomposition: Decomposition

    def __str__(self) -> str:
        names, device = self.decomposition.names, self.subject.target.device
        slices = sum(self.decomposition.of(name).U.shape[1] for name in names)
        return f"{self.directory.path}: {len(names)} matrices, {slices} slices, on {device}"


def load(path: str | Path, device: str | None = None) -> LoadedRun:
    """Open the run at `path`; SpdError when there is none or it has no decomposition yet.

    `device` is auto, cpu or cuda; the recipe's own when left out.
    """
    directory = RunDirectory.open(Path(path))
    recipe = directory.recipe
    if (directory / TOY_WEIGHTS).exists():
        raise SpdError(
            f"{path} holds a trained toy and no decomposition",
            f"spd decompose RECIPE --set target.path={path} takes it apart",
        )
    tensors, _ = load_tensors(directory / DECOMPOSITION)
    subject = open_subject(recipe, choose_device(device or recipe.device), directory / TOY)
    return LoadedRun(directory, recipe, subject, load_decomposition(recipe, subject, tensors))
