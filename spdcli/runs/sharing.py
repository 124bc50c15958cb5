"""A run for others: a directory, or a repository of the Hugging Face hub, that holds what a reader of it needs.

recipe.toml, target.json, decomposition.safetensors, toy/target.safetensors   as in any run directory, which it is
eval.json                                                        where the run was evaluated
README.md                                                        a model card, written from these
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download

from spdcli.disk import write_directory, write_json, write_text
from spdcli.engine.tables import LOSSES
from spdcli.errors import UsageError
from spdcli.files import save_tensors
from spdcli.recipe.schema import HuggingFaceTarget, Recipe
from spdcli.runs.directory import DECOMPOSITION, EVAL, RECIPE, TOY, TOY_WEIGHTS, RunDirectory
from spdcli.runs.fingerprint import FINGERPRINT, keep_fingerprint
from spdcli.runs.loading import LoadedRun
from spdcli.runs.results import checked_result, sealed
from spdcli.targets.model_files import is_local
from spdcli.targets.sources import PACKAGE, hub_error

CARD, LIBRARY, TAGS = "README.md", "spd", ["interpretability", "parameter-decomposition"]
FILES = [RECIPE, DECOMPOSITION, FINGERPRINT, EVAL, CARD, f"{TOY}/{TOY_WEIGHTS}"]

USE = """\
## Use

```python
import spdcli

run = spdcli.from_pretrained("OWNER/NAME")  # or a directory
U, V = run.slices(run.matrices[0])
```"""


def write_shared(run: LoadedRun, folder: Path, force: bool = False) -> Path:
    """The run at `folder` for others to `load`; UsageError for a folder that is there, unless `force` replaces it."""
    if folder.exists() and not force:
        raise UsageError(f"{folder} is there already", "name another, or --force replaces it")
    evaluation = {} if run.directory is None else own_evaluation(run.directory)

    def fill(new: Path) -> None:
        shared = RunDirectory(new)
        recipe = run.recipe
        if run.subject.trained_toy is not None:
            save_tensors(shared / TOY / TOY_WEIGHTS, run.subject.trained_toy.state_dict())
            recipe = recipe.model_copy(update={"target": recipe.target.model_copy(update={"path": None})})
        shared.write_recipe(recipe)
        keep_fingerprint(new, run.subject.target)
        shared.save_decomposition(run.decomposition)
        if evaluation:
            write_json(shared / EVAL, sealed({**evaluation, "run": run.recipe.name}))  # not where it lay
        write_text(shared / CARD, str(model_card(run, evaluation)))

    write_directory(folder, fill)
    return folder


def own_evaluation(run: RunDirectory) -> dict[str, Any]:
    """The run's evaluation, or nothing; SpdError where there is one that is damaged, or of another decomposition."""
    if not (run / EVAL).exists():
        return {}
    return checked_result(run, EVAL, f"spd eval {run} measures it again")


def push(run: LoadedRun, repository: str, private: bool = False) -> str:
    """Uploads the run to `repository` (OWNER/NAME) on the hub, which is made if need be, and gives its address."""
    with tempfile.TemporaryDirectory() as parent:
        folder = write_shared(run, Path(parent) / "run")
        try:
            address = HfApi().create_repo(repository, private=private, exist_ok=True)
            HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="A decomposition by spd")
        except Exception as error:  # the hub's libraries raise a dozen unrelated types
            raise hub_error(repository, error) from error
    return str(address)


def fetch(repository: str, revision: str | None = None) -> Path:
    """The local directory of a run on the hub."""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=FILES))
    except Exception as error:  # as in push
        raise hub_error(repository, error) from error


def model_card(run: LoadedRun, evaluation: Mapping[str, Any]) -> ModelCard:
    """What was taken apart, by what recipe, and how well, as `evaluation` (`spd.eval/2`, or nothing) says."""
    data = ModelCardData(library_name=LIBRARY, base_model=base_model(run.recipe), tags=TAGS)
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join([*_about(run), *_measured(evaluation), USE]) + "\n"
    )


def base_model(recipe: Recipe) -> str | None:
    """The hub id of the target; None for a toy, a local file, or a file of a package."""
    if not isinstance(recipe.target, HuggingFaceTarget):
        return None
    model = recipe.target.model
    return None if model.startswith(PACKAGE) or is_local(model) else model


def _about(run: LoadedRun) -> list[str]:
    names = run.decomposition.names
    counts = [run.decomposition.of(name).U.shape[1] for name in names]
    rows = "\n".join(f"| `{name}` | {count} |" for name, count in zip(names, counts, strict=True))
    kind = run.recipe.importance.kind
    return [
        f"# {run.recipe.name}",
        f"{len(names)} weight matrices of a target of kind `{run.recipe.target.kind}`, each written as a sum of rank-1 "
        f"slices by Stochastic Parameter Decomposition, with importance functions of kind `{kind}`: "
        f"{sum(counts)} slices. `{RECIPE}` is the whole recipe.",
        f"| matrix | slices |\n|---|---|\n{rows}",
    ]


def _measured(evaluation: Mapping[str, Any]) -> list[str]:
    if not evaluation:
        return ["It was not evaluated before it was shared."]
    known = {name: value for name, value in evaluation["metrics"].items() if value is not None}
    rows = "\n".join(f"| {name} | {_evidence(name)} | {value:.3g} |" for name, value in known.items())
    return ["## Measured", f"| loss | evidence | value |\n|---|---|---|\n{rows}", f"`{EVAL}` says more."]


def _evidence(loss: str) -> str:
    grade = LOSSES[loss].grade if loss in LOSSES else None
    return grade.label if grade else ""
