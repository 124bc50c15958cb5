"""The Python door: what `import spdcli` offers. Every command is a thin shell over these functions and over `Run`.

Nothing here prints, and nothing needs a run directory: with `out=None` all stays in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from spdcli.costs.room import refuse_beyond_reason, refuse_without_room
from spdcli.engine.target import Target
from spdcli.errors import Interrupted, UsageError
from spdcli.figures.curves import save_training_curve
from spdcli.progress import Report, silent, without_steps
from spdcli.recipe.overrides import Override, text_in_place_of_prompts
from spdcli.recipe.reading import LoadedRecipe, checked_recipe, find_recipe, load_recipe, parse_toml, read_toml
from spdcli.recipe.schema import Recipe
from spdcli.recipe.toml_lines import split_key
from spdcli.run import Run
from spdcli.runs import loading
from spdcli.runs.directory import FIGURES, METRICS, TOY, RunDirectory, ToyDirectory
from spdcli.runs.following import FollowedRun
from spdcli.runs.goodfire import import_run
from spdcli.runs.joining import Meeting, met, started_counts
from spdcli.runs.launching import launch
from spdcli.runs.learning import Store, learned
from spdcli.runs.memory import MemoryRun
from spdcli.runs.module_subject import ModuleData, module_subject
from spdcli.runs.opening import can_go_on, opened_run
from spdcli.runs.sharing import fetch
from spdcli.runs.subject import Subject, choose_device
from spdcli.runs.tensorboard import require_tensorboard
from spdcli.runs.training import (
    TrainedToy,
    finish_run,
    prepared_subject,
    require_toy,
    train_toy_of,
)

RecipeLike = str | Path | Recipe | Mapping[str, Any] | LoadedRecipe


def load(
    path: str | Path,
    device: str | None = None,
    *,
    target: Target | None = None,
    data: ModuleData | None = None,
    tokenizer: Any = None,
) -> Run:
    """Open the run directory at `path`. SpdError when there is none, or it has no decomposition yet.

    `device` is auto, cpu or cuda; the recipe's own when left out. A run of a module of your own is given the `target`
    and the `data` that `decompose` was given.
    """
    opened = None if target is None else lambda recipe: own_subject(recipe, target, data, tokenizer)
    loaded = loading.load(path, device, opened)
    return Run(loaded.directory, loaded.recipe, loaded.subject, loaded.decomposition)


def from_pretrained(name: str | Path, device: str | None = None, revision: str | None = None) -> Run:
    """Open a run that was shared: a directory that `Run.save_pretrained` wrote, or OWNER/NAME on the Hugging Face hub.

    SpdError, one line, where there is none or the hub cannot be reached; nothing that it holds is executed.
    """
    return load(name if Path(name).is_dir() else fetch(str(name), revision), device)


def import_checkpoint(
    path: str | Path,
    recipe: RecipeLike,
    *,
    device: str | None = None,
    progress: Report | None = None,
    **settings: Any,
) -> Run:
    """A run of a checkpoint of goodfire-ai/spd, as `spd import`; it is kept in memory until `Run.save`.

    The recipe says of which language model the checkpoint is, and what its prompts are. SpdError where the checkpoint
    does not fit; nothing that it holds is executed.
    """
    loaded = recipe_of(recipe, settings, device=device)
    run = import_run(loaded.recipe, Path(path), device, _report(progress))
    return Run(None, run.recipe, run.subject, run.decomposition)


def own_subject(recipe: Recipe, target: Target, data: ModuleData | None, tokenizer: Any) -> Subject:
    """The subject of a module of the caller's own."""
    if not isinstance(target, Target):
        raise UsageError(
            f"target= is a {type(target).__name__}", "give what spdcli.module_target(module, ...) makes of it"
        )
    if recipe.target.kind != "module":
        raise UsageError(f"target= is for a module of your own, and this recipe has kind = '{recipe.target.kind}'")
    if data is None:
        raise UsageError("a target needs data", "give data=, token ids [B, T] or a function that draws them")
    return module_subject(recipe, target, data, tokenizer)


def decompose(
    recipe: RecipeLike,
    out: str | Path | None = None,
    *,
    progress: Report | None = None,
    seed: int | None = None,
    device: str | None = None,
    force: bool = False,
    resume: bool = False,
    target: Target | None = None,
    data: ModuleData | str | Path | None = None,
    tokenizer: Any = None,
    nproc: int = 1,
    **settings: Any,
) -> Run:
    """Take a target apart by a recipe (Algorithm 3), as `spd decompose` does, and give the run.

    `recipe` is a file, a shipped recipe's name, or its sections as a dict; `settings` change single values, as in
    `**{"decompose.steps": 200}`. With `out` the run directory is written there (`force` replaces another run, `resume`
    goes on with this one); without, nothing is. `progress` is called with what there is to tell: `print` will do.

    `data` is text in place of the recipe's prompts, as `--data`: a file, a directory, `datasets:NAME`, `generated`. Or
    a `target` of `module_target` is taken apart in place of the recipe's, on `data`: token ids `[B, T]`, or a function
    that draws them from a generator; its `tokenizer` is for words in place of numbers.

    `nproc` processes of this machine make the run together, started here, into `out`. In a program that torchrun has
    started, the processes that it is make it together, `out` or not: every one of them gets the run.

    RecipeError with every mistake of the recipe; Interrupted after Ctrl-C, with everything saved.
    """
    text, own_data = (data, None) if isinstance(data, str | Path) else (None, data)
    if target is None and own_data is not None:
        raise UsageError(
            "data= is for a target of your own, and there is no target=",
            "a recipe's [data] has its prompts; data= may be the path of a text",
        )
    if target is not None and text is not None:
        raise UsageError("data= is a text, and a target of your own is given tokens", "give token ids [B, T]")
    loaded = recipe_of(recipe, settings, seed, device, own_target=target is not None, text=text)
    report = _report(progress)
    if nproc > 1:
        if out is None or target is not None:
            raise UsageError(
                "nproc= is about a run directory of a target that its recipe names", "torchrun starts a program's own"
            )
        return _launched(nproc, Path(out), loaded, device, report, force, resume)
    subject = None if target is None else own_subject(loaded.recipe, target, own_data, tokenizer)
    if out is None and (resume or force):
        raise UsageError("resume and force are about a run directory", "give out=")
    directory = None if out is None else RunDirectory(Path(out))
    require_tensorboard(loaded.recipe.decompose.tensorboard, directory or MemoryRun())
    with _told_to_stop(directory), met(loaded.recipe.device) as meeting:
        return _decomposed(directory, loaded, subject, report, force, resume, meeting)


def _launched(
    nproc: int, out: Path, loaded: LoadedRecipe, device: str | None, report: Report, force: bool, resume: bool
) -> Run:
    """The run at `out`, made by so many processes that are started for it."""
    request = {"recipe": loaded.recipe.model_dump(mode="json", exclude_none=True), "out": str(out)}
    launch(nproc, "spdcli.api:decompose_as_told", request | {"force": force, "resume": resume}, report)
    return load(out, device)


def decompose_as_told(request: Mapping[str, Any], report: Report) -> None:
    """What each of the processes does that `decompose` starts."""
    report.hears_steps = True  # type: ignore[attr-defined]
    told = {key: request[key] for key in ("out", "force", "resume")}
    loaded = checked_recipe(request["recipe"], "recipe", {}, written_by_a_run=True)
    decompose(loaded, progress=report, **told)


def _decomposed(
    directory: RunDirectory | None,
    loaded: LoadedRecipe,
    subject: Subject | None,
    report: Report,
    force: bool,
    resume: bool,
    meeting: Meeting,
) -> Run:
    """The run, made by all processes of the `meeting`; the first alone opens its directory, writes and reports."""
    recipe, processes = loaded.recipe, meeting.processes
    store = directory or MemoryRun()
    if processes.rank:
        subject = meeting.first_then_others(lambda: subject or prepared_subject(store, loaded))
        followed = FollowedRun(directory) if directory is not None else MemoryRun()
        return Run(directory, recipe, subject, learned(followed, loaded, subject, silent, processes))
    with nullcontext() if directory is None else opened_run(directory, recipe, force, resume, report):
        subject = meeting.first_then_others(lambda: subject or prepared(store, loaded, report))
        return Run(directory, recipe, subject, learned(store, loaded, subject, report, processes))


@contextmanager
def _told_to_stop(run: RunDirectory | None) -> Iterator[None]:
    """Interrupted where a signal comes before the first step, or a second Ctrl-C that would not wait."""
    try:
        yield
    except KeyboardInterrupt:
        if run is None or not run.content():
            raise Interrupted("stopped; nothing was kept", "the same command begins anew") from None
        hint = f"{run.command} --resume goes on from there" if can_go_on(run) else "--force begins it anew"
        raise Interrupted(f"stopped at once; {run} is as it was last saved", hint) from None


def train_toy(
    recipe: RecipeLike,
    out: str | Path | None = None,
    *,
    progress: Report | None = None,
    seed: int | None = None,
    device: str | None = None,
    force: bool = False,
    resume: bool = False,
    **settings: Any,
) -> TrainedToy:
    """Train the induction toy of a recipe (section 5.1, Table 3), as `spd train` does.

    With `out` its weights, metrics and loss curve (Figure 5) are written there (`force` replaces another run, `resume`
    goes on with this one); without, nothing is. Interrupted after Ctrl-C, with everything saved.
    """
    loaded = recipe_of(recipe, settings, seed, device)
    require_toy(loaded)
    refuse_beyond_reason(loaded.recipe, choose_device(loaded.recipe.device))
    report = _report(progress)
    if out is None:
        if resume or force:
            raise UsageError("resume and force are about a run directory", "give out=")
        with _told_to_stop(None):
            return train_toy_of(loaded.recipe, MemoryRun(), report)
    directory = ToyDirectory(Path(out))
    with _told_to_stop(directory), opened_run(directory, loaded.recipe, force, resume, report):
        trained = train_toy_of(loaded.recipe, directory, report)
        save_training_curve(trained.records, directory / FIGURES)
    return trained


def recipe_of(
    recipe: RecipeLike,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    device: str | None = None,
    own_target: bool = False,
    text: str | Path | None = None,
) -> LoadedRecipe:
    """A recipe from a file, a shipped recipe's name, its sections as a dict, or one that is read already.

    `settings` map dotted keys to values. With `own_target` its target is a module of the caller's own, whatever the
    recipe was for; a `text` takes the place of its prompts. RecipeError with every mistake.
    """
    changes = [] if text is None else text_in_place_of_prompts(text)
    changes += [override(key, value) for key, value in (settings or {}).items()]
    if isinstance(recipe, LoadedRecipe):
        assert not changes
        return recipe
    if not isinstance(recipe, str | Path | Recipe | Mapping):
        raise UsageError(f"a recipe is no {type(recipe).__name__}", "give a file, a shipped recipe's name, or sections")
    if isinstance(recipe, str | Path):
        if not own_target:
            return load_recipe(recipe, changes, seed=seed, device=device)
        recipe = parse_toml(read_toml(find_recipe(recipe)), str(recipe))
    raw = recipe.model_dump(exclude_none=True) if isinstance(recipe, Recipe) else _tables(recipe)
    if own_target:
        raw = {key: value for key, value in raw.items() if key not in ("data", "train")} | {
            "target": {"kind": "module"}
        }
    return checked_recipe(raw, "recipe", {}, changes, seed=seed, device=device)


def override(key: str, value: Any) -> Override:
    """The setting `key` (dotted) as `value`."""
    path = split_key(key)
    if path is None or (len(path) == 1 and key not in Recipe.model_fields):
        raise UsageError(f"{key!r} is no setting", "a setting is dotted, as in **{'decompose.steps': 200}")
    return Override(f"{key}={value!r}", path, str(value) if isinstance(value, Path) else value)


def _report(progress: Report | None) -> Report:
    """`progress`, told of records and notes; of every step too where it has a true attribute `hears_steps`."""
    if progress is None:
        return silent
    if not callable(progress):
        raise UsageError(f"progress= is a {type(progress).__name__}", "give a function of one argument, such as print")
    return progress if getattr(progress, "hears_steps", False) else without_steps(progress)


def _tables(sections: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that overrides can be written into."""
    return {key: _tables(value) if isinstance(value, Mapping) else value for key, value in sections.items()}


def prepared(store: Store, loaded: LoadedRecipe, report: Report = silent) -> Subject:
    """The target and data of a run; where its toy had to be trained, the toy's loss curve is drawn (Figure 5).

    SpdError before anything is read or trained where there is no room for it.
    """
    refuse_without_room(loaded, choose_device(loaded.recipe.device), *started_counts())
    subject = prepared_subject(store, loaded, report)
    if isinstance(store, RunDirectory) and (store / TOY / METRICS).exists():
        toy = RunDirectory(store / TOY)
        records = [record for record in toy.metrics() if isinstance(record.get("loss"), float)]
        if records and not (toy / FIGURES).exists():
            save_training_curve(records, toy / FIGURES)
    return subject


def finished(run: RunDirectory, loaded: LoadedRecipe, report: Report = silent) -> Run:
    """The run in a directory, with what is not yet trained of it trained now: toy and decomposition."""
    finish_run(run, loaded, lambda: prepared(run, loaded, report), report)
    return load(run.path, loaded.recipe.device)
