"""The run directory: what is in it, written so that a crash loses nothing that was saved.

    recipe.toml                 the resolved recipe, with versions
    metrics.jsonl               one record a logged step
    decomposition.safetensors   slices and importance functions, for readers
    checkpoint/state.safetensors  the same with optimizer, generators, adversary and step, for `--resume`
    toy/                        the run of `spd train` whose toy is decomposed (toys only)
    eval.json, figures/         what `spd eval` found
    certificate.json            what `spd certify` found

Every file is written beside and renamed into place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spdcli.disk import remove, write_text
from spdcli.engine.fit import FitState
from spdcli.errors import SpdError, UsageError
from spdcli.files import load_tensors, save_tensors
from spdcli.recipe.choices import TOYS
from spdcli.recipe.reading import dump_recipe, load_recipe
from spdcli.recipe.schema import GENERATED, Recipe
from spdcli.recipe.section import Section
from spdcli.records import plain

RECIPE, METRICS, EVAL, FIGURES = "recipe.toml", "metrics.jsonl", "eval.json", "figures"
CERTIFICATE = "certificate.json"
DECOMPOSITION, CHECKPOINT, TOY = "decomposition.safetensors", "checkpoint/state.safetensors", "toy"
TOY_WEIGHTS = "target.safetensors"
HELD = (
    RECIPE,
    METRICS,
    EVAL,
    CERTIFICATE,
    FIGURES,
    DECOMPOSITION,
    "checkpoint",
    TOY,
    TOY_WEIGHTS,
)  # what --force replaces


def versions() -> dict[str, str]:
    """The versions a run depends on."""
    versions_by_package = {}
    for package in ("spd-cli", "torch", "transformers", "numpy"):
        try:
            versions_by_package[package] = version(package)
        except PackageNotFoundError:
            versions_by_package[package] = "source"
    return versions_by_package


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with its local paths made absolute, so that a run can be read from any directory."""
    keys = {"huggingface": "model"} | dict.fromkeys(TOYS, "path")
    changes: dict[str, Any] = {}
    if recipe.target.kind in keys:
        changes["target"] = _anchored_key(recipe.target, keys[recipe.target.kind])
    if recipe.data is not None:
        changes["data"] = _anchored_key(recipe.data, "stream")
    return recipe.model_copy(update=changes)


def _anchored_key(section: Section, key: str) -> Section:
    place = getattr(section, key)
    if place in (None, GENERATED) or not Path(place).expanduser().exists():
        return section
    return section.model_copy(update={key: str(Path(place).expanduser().resolve())})


class RunDirectory:
    """A directory that a recipe produces."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, recipe: Recipe, force: bool = False) -> RunDirectory:
        """A new run at `path`.

        A directory that holds another run is refused without `force`, unless that run never got beyond its recipe;
        one that holds no run is refused always. `force` removes what a run consists of and leaves other files alone.
        """
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file, not a directory", "name another with --out")
        if path.is_dir() and any(path.iterdir()):
            if not (path / RECIPE).exists():
                raise UsageError(f"{path} is not empty and holds no run", "name another with --out")
            if not force and any((path / name).exists() for name in HELD if name != RECIPE):
                raise UsageError(
                    f"{path} holds another run", "--force replaces it, --resume goes on, --out names another"
                )
            for name in HELD:
                remove(path / name)
        run = cls(path)
        run.write_recipe(recipe)
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run; SpdError when there is none."""
        if not (path / RECIPE).exists():
            raise SpdError(f"{path}: no run here", "spd decompose RECIPE --out DIRECTORY makes one")
        return cls(path)

    def write_recipe(self, recipe: Recipe) -> None:
        text = dump_recipe(anchored(recipe), **versions())
        write_text(self / RECIPE, text)

    @property
    def recipe(self) -> Recipe:
        return load_recipe(str(self.path / RECIPE), []).recipe

    @property
    def has_checkpoint(self) -> bool:
        return (self / CHECKPOINT).exists()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    def start_metrics(self, after: int = 0) -> None:
        """Keep the metrics up to step `after` (all of an interrupted run's, up to its checkpoint) and drop the rest."""
        kept = [line for record, line in self._metric_lines() if record["step"] <= after]
        write_text(self / METRICS, "".join(kept))

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        try:
            with (self / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(record), allow_nan=False) + "\n")
        except OSError as error:
            raise SpdError(f"{self / METRICS}: cannot be written: {error.strerror}", "free some space") from error

    def metrics(self) -> list[dict[str, Any]]:
        """All records; a line cut short by a crash is left out."""
        return [record for record, _ in self._metric_lines()]

    def _metric_lines(self) -> list[tuple[dict[str, Any], str]]:
        path = self / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        records = []
        for line in lines:
            try:
                records.append((json.loads(line), f"{line.rstrip()}\n"))  # a crash may have cut its end alone
            except json.JSONDecodeError:
                continue
        return records

    def save(self, decomposition: nn.Module, state: FitState) -> None:
        """The checkpoint to go on from, then the decomposition for readers."""
        self.save_checkpoint(decomposition, state)
        self.save_decomposition(decomposition)

    def save_decomposition(self, decomposition: nn.Module) -> None:
        save_tensors(self / DECOMPOSITION, decomposition.state_dict())

    def save_checkpoint(self, decomposition: nn.Module, state: FitState) -> None:
        """Everything `--resume` needs, in one file."""
        tensors = {f"parameters.{name}": tensor for name, tensor in decomposition.state_dict().items()}
        for index, values in state.optimiser.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
        tensors |= {f"generator.{name}": g.get_state() for name, g in state.generators.items()}
        tensors |= {f"adversary.{name}": numbers for name, numbers in state.adversary.items()}
        save_tensors(self / CHECKPOINT, tensors, {"step": str(state.step), "seconds": str(state.seconds)})

    def load_checkpoint(self, decomposition: nn.Module, state: FitState) -> None:
        """Put `decomposition` and `state` back where `save_checkpoint` found them.

        On another kind of device than then, whose generators have another state, the noise begins anew.
        """
        tensors, metadata = load_tensors(self / CHECKPOINT)
        parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "optimizer": {}, "generator": {}, "adversary": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = tensor
        decomposition.load_state_dict(parts["parameters"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        state.optimiser.load_state_dict({**state.optimiser.state_dict(), "state": moments})
        for name, value in parts["generator"].items():
            if value.shape == state.generators[name].get_state().shape:
                state.generators[name].set_state(value)
        device = state.optimiser.param_groups[0]["params"][0].device
        state.adversary = {name: numbers.to(device) for name, numbers in parts["adversary"].items()}
        state.step, state.seconds = int(metadata["step"]), float(metadata["seconds"])
