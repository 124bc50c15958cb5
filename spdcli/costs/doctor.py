"""What is installed here, what this machine can do, and which models are at hand without a network.

Nothing is loaded: packages are read from their metadata, models from where they lie.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

import torch
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from packaging.requirements import Requirement

from spdcli.machine import PRODUCT_SIZE, Machine, describe, free_bytes, product_inputs, synchronise
from spdcli.recipe.reading import load_recipe, shipped
from spdcli.runs.directory import RECIPE
from spdcli.targets.sources import PACKAGE

OURS = "spd-cli"
PRODUCTS = 5  # timed matrix products, after one that is not


@dataclass(frozen=True)
class Extra:
    """Optional packages of one name, `pip install 'spd-cli[name]'`: versions, None where one is not installed."""

    name: str
    packages: Mapping[str, str | None]

    @property
    def complete(self) -> bool:
        """Whether all of them are installed."""
        return None not in self.packages.values()


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """`spd.doctor/1`. `packages` are the versions of what spd needs; memory and disk are free bytes, disk that of the
    current directory; `flops` the floating-point operations a second of a square product in float32.

    `models` are spelled as `target.model` takes them, and need no network; `recipes` are those shipped whose model is
    among them, or that train their own; `runs` the run directories beneath the current one. `next` is a command.
    """

    spd: str
    machine: Machine
    packages: Mapping[str, str | None]
    extras: list[Extra]
    memory: int
    disk: int
    flops: float
    models: list[str]
    recipes: list[str]
    runs: list[str]
    next: str


def checkup(folder: Path, device: torch.device) -> Checkup:
    """Looks at this machine, from `folder`, for work on `device`."""
    needed, extras = requirements()
    models = models_at_hand()
    recipes = [name for name in shipped() if recipe_runs(name, models)]
    runs = sorted(str(found.parent.relative_to(folder)) for found in folder.glob(f"*/{RECIPE}"))
    return Checkup(
        spd=distribution(OURS).version,
        machine=describe(device),
        packages=needed,
        extras=extras,
        memory=free_bytes(device),
        disk=shutil.disk_usage(folder).free,
        flops=product_flops(device),
        models=models,
        recipes=recipes,
        runs=runs,
        next=next_command(recipes, runs),
    )


def requirements() -> tuple[dict[str, str | None], list[Extra]]:
    """What spd needs, and the optional packages by extra, with the versions that are installed."""
    needed: dict[str, str | None] = {}
    extras: dict[str, dict[str, str | None]] = {
        name: {} for name in distribution(OURS).metadata.get_all("Provides-Extra") or ()
    }
    for line in distribution(OURS).requires or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            needed[requirement.name] = version_of(requirement.name)
        for extra, packages in extras.items():
            if marker is not None and marker.evaluate({"extra": extra}):
                packages[requirement.name] = version_of(requirement.name)
    return needed, [Extra(name, packages) for name, packages in extras.items()]


def version_of(package: str) -> str | None:
    """The version that is installed, None where none is."""
    try:
        return distribution(package).version
    except PackageNotFoundError:
        return None


def models_at_hand() -> list[str]:
    """Models that need no network: `.gguf` files in installed packages, and what the hub's cache holds."""
    return [*sorted(packaged_models()), *sorted(cached_models())]


def packaged_models() -> Iterator[str]:
    """Every `.gguf` file of an installed package, as `package:NAME/FILE`."""
    for installed in distributions():
        for file in installed.files or ():
            if file.suffix == ".gguf":
                yield f"{PACKAGE}{file.as_posix()}"


def cached_models() -> Iterator[str]:
    """Every model in the hub's cache that has weights as safetensors, by its id."""
    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return
    for repository in cache.repos:
        files = {file.file_name for revision in repository.revisions for file in revision.files}
        if repository.repo_type == "model" and any(name.endswith(".safetensors") for name in files):
            yield repository.repo_id


def recipe_runs(name: str, models: list[str]) -> bool:
    """Whether a shipped recipe can be decomposed here without a network."""
    target = load_recipe(name).recipe.target
    return target.kind != "huggingface" or target.model in models


def product_flops(device: torch.device) -> float:
    """Floating-point operations a second of a square matrix product in float32, the median of a few."""
    a, b = product_inputs(device)
    seconds = []
    for _ in range(PRODUCTS + 1):
        synchronise(device)
        begun = time.perf_counter()
        _ = a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * PRODUCT_SIZE**3 / statistics.median(seconds[1:])


def next_command(recipes: list[str], runs: list[str]) -> str:
    """What to try: a look at a run that is here, else the real model where it is at hand, else the toy."""
    if runs:
        return f"spd inspect {runs[0]}"
    return f"spd decompose {'smollm2' if 'smollm2' in recipes else 'induction-quick'} --out run"
