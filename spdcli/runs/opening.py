"""The directory of a run, opened to write: new, or with `--resume` the one that is there; locked for as long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from spdcli.disk import sweep
from spdcli.errors import Missing, SpdError, UsageError
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.reading import LoadedRecipe
from spdcli.recipe.schema import Recipe
from spdcli.runs.anchoring import anchored
from spdcli.runs.directory import (
    CERTIFICATE,
    DECOMPOSITION,
    EVAL,
    RECIPE,
    TOY,
    TOY_WEIGHTS,
    RunDirectory,
    ToyDirectory,
    conditions,
)
from spdcli.runs.lock import locked

# What a run that goes on may be given anew.
CHANGEABLE = ("losses", "adversary", "decompose", "device", "name", "certify")
OF_A_TOY = ("target", "seed")  # what a toy whose training goes on may not
Directory = TypeVar("Directory", bound=RunDirectory)


@contextmanager
def opened_run(
    run: Directory, recipe: Recipe, force: bool = False, resume: bool = False, report: Report = silent
) -> Iterator[Directory]:
    """While open, `run` is this process's to write by `recipe`, and no other's: new, or with `resume` as it is there.

    `force` replaces another run. UsageError where either is not possible, SpdError where there is nothing to go on
    from. A new run that comes to nothing, by an error or an interruption, leaves nothing.
    """
    if resume and force:
        raise UsageError("--resume and --force contradict each other", "give one of the two")
    if resume:
        refuse_without_beginning(run)
    else:
        run.refuse_unless_free(recipe, force)
    existed, began = run.path.exists(), force or not (run / RECIPE).exists()
    try:
        with locked(run.path) as left:
            if left:
                report(Progress(f"{run}: the lock of {left}, was left behind and is taken over"))
            if not force:
                run.refuse_links()
            for folder in (run.path, run / "checkpoint", run / TOY, run / TOY / "checkpoint"):
                sweep(folder)
            if resume:
                continue_run(run, recipe, report)
            else:
                run.create(run.path, recipe, force)
            try:
                yield run
            except BaseException:
                if began and not resume:
                    run.forget_beginning()
                raise
    finally:
        if not existed:
            with suppress(OSError):  # unless it is empty
                run.path.rmdir()


def can_go_on(run: RunDirectory) -> bool:
    """Whether there is something in `run` to go on from: a checkpoint, or the toy that it decomposes and no result."""
    toy = ToyDirectory(run / TOY)
    results = any((run / name).exists() for name in (DECOMPOSITION, EVAL, CERTIFICATE))
    return run.has_checkpoint or (not results and ((toy / TOY_WEIGHTS).exists() or toy.has_checkpoint))


def refuse_without_beginning(run: RunDirectory) -> None:
    """SpdError unless `run` can go on, telling what there is."""
    if can_go_on(run):
        return
    if not isinstance(run, ToyDirectory) and ((run / TOY_WEIGHTS).exists() or ToyDirectory(run.path).has_checkpoint):
        raise UsageError(
            f"{run} holds a toy and no decomposition",
            f"--set target.path={run} --out another decomposes that toy once it is trained",
        )
    there = run.content()
    if not there and run.path.is_dir() and any(run.path.iterdir()):
        raise UsageError(f"{run} is not empty and holds no run", "name another with --out")
    if not there:
        raise Missing(f"{run}: no run to go on with", "leave --resume out, and it begins")
    raise SpdError(
        f"{run}: no checkpoint to go on from; there is {', '.join(there)}",
        "--force begins it anew and replaces that, --out names another directory",
    )


def continue_run(run: RunDirectory, recipe: Recipe, report: Report) -> None:
    """Let `run` go on by `recipe`: losses and training may have changed, what is trained may not."""
    run.open(run.path)
    changed = changed_settings(run, recipe)
    of_a_toy = isinstance(run, ToyDirectory)
    for key, (before, after) in changed.items():
        section = key.split(".")[0]
        if section in OF_A_TOY if of_a_toy else section not in CHANGEABLE:
            command = "train" if of_a_toy else "decompose"
            raise UsageError(
                f"{run} was made with {key} = {before!r}, not {after!r}",
                f"spd {command} {run}/recipe.toml --out {run} --resume goes on with its own settings",
            )
    for key, (before, after) in changed.items():
        report(Progress(f"{key} changes from {before!r} to {after!r}"))
    if warn_of_conditions(run, report) or changed:
        run.write_recipe(recipe)


def warn_of_conditions(run: RunDirectory, report: Report) -> bool:
    """Whether `run` was made with other versions or threads than there are now; each of them is told."""
    now = conditions()
    others = {name: value for name, value in run.conditions.items() if value != now[name]}
    for name, value in others.items():
        text = f"{run} was made with {name} {value}, and goes on with {now[name]}: its last digits depend on that"
        report(Progress(text, warning=True))
    return bool(others)


def changed_settings(run: RunDirectory, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Where `recipe` differs from that of `run`: dotted key -> (the run's value, the recipe's)."""
    before, after = flat(run.recipe.model_dump()), flat(anchored(recipe).model_dump())
    keys = sorted(before | after)
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def claimed_run(path: Path, loaded: LoadedRecipe, force: bool, report: Report) -> RunDirectory:
    """The run at `path`, there already by the same recipe, or new; UsageError when it is by another one.

    Of one that is there it is told where its versions or threads were others than now.
    """
    if force or not (path / RECIPE).exists():
        return RunDirectory.create(path, loaded.recipe, force)
    run = RunDirectory.open(path)
    for key, (before, after) in changed_settings(run, loaded.recipe).items():
        if key.split(".")[0] in ("device", "certify"):  # neither changes what the run is
            continue
        raise UsageError(
            f"{path} was made with {key} = {before!r}, not {after!r}",
            "--force replaces it, --out names another directory",
        )
    warn_of_conditions(run, report)
    return run
