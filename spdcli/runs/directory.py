"""The run directory: what is in it, written so that a crash loses nothing that was saved.

    recipe.toml                 the resolved recipe, with versions
    metrics.jsonl               one record a logged step
    decomposition.safetensors   slices and importance functions, for readers
    checkpoint/state.safetensors  the same with optimizer, generators, adversary and step, for `--resume`
    checkpoint/state-before.safetensors  the checkpoint before that one, for when it is damaged
    toy/                        the run of `spd train` whose toy is decomposed (toys only)
    target.json                 hashes of the target's weights, which every reader compares
    eval.json, figures/         what `spd eval` found
    certificate.json            what `spd certify` found
    harvest/                    what `spd harvest` saw slices do over text
    tensorboard/                the metrics as event files, where the recipe wants them
    .lock                       who is writing, while somebody is

A run of `spd train` has target.safetensors, and checkpoint/toy.safetensors to go on from.
Every file is written beside and renamed into place, and flushed to the disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from spdcli.disk import UNFINISHED, append_line, read_bytes, remove, sync, write_text
from spdcli.engine.fit import FitState
from spdcli.errors import Missing, RecipeError, SpdError, UsageError
from spdcli.files import save_tensors
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.reading import dump_recipe, load_recipe
from spdcli.recipe.schema import Recipe
from spdcli.records import plain
from spdcli.runs.anchoring import anchored
from spdcli.runs.checkpoints import read_checkpoint, write_checkpoint
from spdcli.runs.contents import is_record, is_whole_record
from spdcli.runs.fingerprint import FINGERPRINT
from spdcli.runs.lock import LOCK, locked

RECIPE, METRICS, EVAL, FIGURES = "recipe.toml", "metrics.jsonl", "eval.json", "figures"
CERTIFICATE, HARVEST, EVENTS = "certificate.json", "harvest", "tensorboard"
DECOMPOSITION, CHECKPOINT, TOY = "decomposition.safetensors", "checkpoint/state.safetensors", "toy"
TOY_WEIGHTS, TOY_CHECKPOINT = "target.safetensors", "checkpoint/toy.safetensors"
LARGEST_METRICS = 2**30  # bytes
WRITTEN_BY_SPD = "# spd-cli: "  # begins the recipe of a run, and no recipe that somebody wrote
HELD = (
    RECIPE,
    METRICS,
    EVAL,
    CERTIFICATE,
    FIGURES,
    HARVEST,
    EVENTS,
    DECOMPOSITION,
    "checkpoint",
    TOY,
    TOY_WEIGHTS,
    FINGERPRINT,
)  # what --force replaces


def conditions() -> dict[str, str]:
    """What a run's last digits depend on besides its recipe: versions, and the number of threads, by which sums are
    cut."""
    values = {}
    for package in ("spd-cli", "torch", "transformers", "numpy"):
        try:
            values[package] = version(package)
        except PackageNotFoundError:
            values[package] = "source"
    return values | {"threads": str(torch.get_num_threads())}


class RunDirectory:
    """A directory that a recipe produces."""

    checkpoint = CHECKPOINT

    def __init__(self, path: Path) -> None:
        self.path = path
        self._newest: int | None = None  # the step of the newest checkpoint, once it was written or read
        self._spoilt = False  # whether it is not to be gone on from

    @classmethod
    def create(cls, path: Path, recipe: Recipe, force: bool = False) -> Self:
        """A new run at `path`.

        A directory that holds a run is refused without `force`, unless it is one by this recipe that never got beyond
        it; one that holds no run is refused always, somebody's own recipe.toml in it or not. `force` removes what a
        run consists of and leaves other files alone. SpdError while another process writes there.
        """
        run = cls(path)
        run.refuse_unless_free(recipe, force)
        with locked(path):
            run.refuse_unless_free(recipe, force)
            if force:
                for name in HELD:
                    remove(path / name)
            run.refuse_links()
            remove(run / FINGERPRINT)
            if not (run / RECIPE).exists():
                run.write_recipe(recipe)
        return run

    def refuse_unless_free(self, recipe: Recipe, force: bool) -> None:
        """UsageError where `create` may not begin a run."""
        path = self.path
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file, not a directory", "name another with --out")
        if not path.is_dir() or not (present := [file for file in path.iterdir() if not _passing(file)]):
            return
        if not _written_by_spd(path / RECIPE):
            own = f"; {RECIPE} is not one of spd's" if (path / RECIPE).exists() else ""
            raise UsageError(f"{path} is not empty and holds no run{own}", "name another with --out")
        if force:
            return
        beyond = {file.name for file in present}.intersection(HELD) - {RECIPE, FINGERPRINT}
        if beyond or not self._is_by(recipe):
            raise UsageError(f"{path} holds another run", "--force replaces it, --resume goes on, --out names another")

    def _is_by(self, recipe: Recipe) -> bool:
        try:
            return self.recipe == anchored(recipe)
        except RecipeError:  # of another version of spd
            return False

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing run; SpdError when there is none."""
        if not (path / RECIPE).exists():
            raise Missing(f"{path}: no run here", "spd decompose RECIPE --out DIRECTORY makes one")
        run = cls(path)
        run.refuse_links()
        return run

    def refuse_links(self) -> None:
        """SpdError where a directory within the run is a link: who made the run would say where others write."""
        for name in (FIGURES, "checkpoint", TOY, f"{TOY}/checkpoint", f"{TOY}/{FIGURES}"):
            if (self / name).is_symlink():
                raise SpdError(
                    f"{self / name}: a link out of the run, and nothing is written through it",
                    "put the directory itself there, or remove the link",
                )

    def write_recipe(self, recipe: Recipe) -> None:
        text = dump_recipe(anchored(recipe), **conditions())
        write_text(self / RECIPE, text)

    @property
    def conditions(self) -> dict[str, str]:
        """Those under which the run was made, as far as it says."""
        comments = re.findall(r"^# ([a-z-]+): (.*)$", (self / RECIPE).read_text(encoding="utf-8"), re.MULTILINE)
        return {name: value for name, value in comments if name in conditions()}

    @property
    def recipe(self) -> Recipe:
        return load_recipe(str(self.path / RECIPE), written_by_a_run=True).recipe

    @property
    def checkpoint_before(self) -> Path:
        """Where the checkpoint before the newest is."""
        newest = self / self.checkpoint
        return newest.with_stem(f"{newest.stem}-before")

    @property
    def has_checkpoint(self) -> bool:
        return (self / self.checkpoint).exists() or self.checkpoint_before.exists()

    @property
    def way_back(self) -> str:
        """A hint for when the decomposition is damaged: what makes it again."""
        how = "--resume writes it again from the checkpoint" if self.has_checkpoint else "--force makes it again"
        return f"{self.command} {how}"

    @property
    def command(self) -> str:
        """The command that makes the run, by its own recipe, but for `--resume` or `--force`."""
        return f"spd decompose {self / RECIPE} --out {self}"

    @property
    def last_record(self) -> dict[str, Any]:
        """The last record of the decomposition's training; SpdError where the metrics hold none."""
        whole = [record for record in self.metrics() if is_whole_record(record)]
        if not whole:
            raise SpdError(
                f"{self / METRICS}: holds no record of the training",
                f"the decomposition can be read without it: spd eval {self}",
            )
        return whole[-1]

    def content(self) -> list[str]:
        """What there is of a run, for people."""
        about = {METRICS: f" up to step {self.metrics()[-1]['step']}" if self.metrics() else ", empty"}
        return [name + about.get(name, "") for name in HELD if (self / name).exists()]

    def forget_beginning(self) -> None:
        """Remove the recipe and the empty metrics of a run that came to nothing; nothing where there is more."""
        beginning = (RECIPE, METRICS, FINGERPRINT)
        if any((self / name).exists() for name in HELD if name not in beginning) or self.metrics():
            return
        for name in beginning:
            remove(self / name)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    def start_metrics(self, after: int = 0) -> None:
        """Keep the metrics up to step `after` (all of an interrupted run's, up to its checkpoint) and drop the rest."""
        kept = [line for record, line in self._metric_lines() if record["step"] <= after]
        write_text(self / METRICS, "".join(kept))

    def require(self) -> None:
        """SpdError where the directory was removed while its run went on: it is not made again."""
        if not (self / RECIPE).exists():
            raise SpdError(f"{self.path}: was removed while the run went on", "run again; what it held is lost")

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        self.require()
        append_line(self / METRICS, json.dumps(plain(record), allow_nan=False))

    def metrics(self) -> list[dict[str, Any]]:
        """All records; a line that is cut short or damaged is left out."""
        return [record for record, _ in self._metric_lines()]

    def _metric_lines(self) -> list[tuple[dict[str, Any], str]]:
        path = self / METRICS
        records = []
        for line in read_bytes(path, LARGEST_METRICS).split(b"\n") if path.exists() else []:
            try:
                record = json.loads(line)  # a crash may have cut its end alone
            except (ValueError, RecursionError):
                continue
            if is_record(record):
                records.append((record, f"{line.decode().rstrip()}\n"))
        return records

    def save(self, decomposition: nn.Module, state: FitState) -> None:
        """The checkpoint to go on from, then the decomposition for readers."""
        self.save_checkpoint(decomposition, state)
        self.save_decomposition(decomposition)

    def save_decomposition(self, decomposition: nn.Module) -> None:
        save_tensors(self / DECOMPOSITION, decomposition.state_dict())

    def save_checkpoint(self, module: nn.Module, state: FitState) -> None:
        """Everything `--resume` needs, in one file; the newest before it is kept beside it."""
        self.require()
        if (self / METRICS).is_file():
            sync(self / METRICS)
        kept = not self._spoilt and self._newest != state.step
        write_checkpoint(self / self.checkpoint, self.checkpoint_before if kept else None, module, state)
        self._newest, self._spoilt = state.step, False

    def keep_step(self, module: nn.Module, state: FitState, step: int) -> None:
        """Save what training reached at `step`, before it had to stop; the decomposition for readers stays as it is."""
        if step not in (0, self._newest):
            state.step = step
            self.save_checkpoint(module, state)

    def load_checkpoint(self, module: nn.Module, state: FitState, report: Report = silent) -> None:
        """Put `module` and `state` back where `save_checkpoint` found them; from the checkpoint before the newest, and
        with a warning, where that one is damaged.

        On another kind of device than then, whose generators have another state, the noise begins anew.
        """
        if not self._spoilt:
            try:
                read_checkpoint(self / self.checkpoint, module, state)
            except SpdError as error:
                if not self.step_back():
                    raise
                report(Progress(f"{error}; going on from the checkpoint before it", warning=True))
        if self._spoilt:
            read_checkpoint(self.checkpoint_before, module, state)
        self._newest = state.step

    def step_back(self) -> bool:
        """Have the checkpoint before the newest loaded from now on; False where there is none. No file changes until
        the next checkpoint, which takes the place of the newest."""
        if self._spoilt or not self.checkpoint_before.exists():
            return False
        self._spoilt = True
        return True


class ToyDirectory(RunDirectory):
    """The run of `spd train`."""

    checkpoint = TOY_CHECKPOINT

    @property
    def command(self) -> str:
        """That of `spd train`; of a toy within the run that decomposes it, that of the run."""
        whole = RunDirectory(self.path.parent)
        if self.path.name == TOY and (whole / RECIPE).exists():
            return whole.command
        return f"spd train {self / RECIPE} --out {self}"


def _passing(file: Path) -> bool:
    """Whether a file is there only while somebody writes."""
    return file.name == LOCK or file.suffix == UNFINISHED


def _written_by_spd(recipe: Path) -> bool:
    try:
        return recipe.read_text(encoding="utf-8").startswith(WRITTEN_BY_SPD)
    except (OSError, UnicodeDecodeError):
        return False
