"""A language model by name, or by a run's directory, without its decomposition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spdcli.engine.target import Target
from spdcli.errors import UsageError
from spdcli.recipe.choices import TOYS
from spdcli.recipe.schema import HuggingFaceTarget
from spdcli.runs.directory import RECIPE, RunDirectory
from spdcli.runs.fingerprint import require_same_weights
from spdcli.runs.subject import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class NamedModel:
    """A model as a target with its tokenizer; `name` is how it is spelled, in a run's recipe where it was named by a
    run, which also says whether prompts have a `begin_token`."""

    target: Target
    tokenizer: PreTrainedTokenizerBase
    name: str
    begin_token: bool


def token_text_of(run: Path) -> Callable[[int], str]:
    """What names the tokens of the run directory `run`, without its model; UsageError for a run of another target."""
    from spdcli.targets.huggingface import load_tokenizer
    from spdcli.targets.prompts import token_text

    recipe = RunDirectory.open(run).recipe
    if not isinstance(recipe.target, HuggingFaceTarget):
        raise UsageError(f"{run} is no run of a language model, and has no text")
    return partial(token_text, load_tokenizer(recipe.target.model))


def open_model(name: str, device: str | None = None, begin_token: bool | None = None) -> NamedModel:
    """The model `name`: a hub id, a directory, a .gguf file, package:NAME/FILE, or a run directory.

    `device` is auto, cpu or cuda; a run's own when left out. `begin_token` as in `prompts.encode`. UsageError for a run
    of another target.
    """
    from spdcli.targets.huggingface import build_target, load_model
    from spdcli.targets.prompts import begins_texts

    dtype, run = "float32", None
    if (Path(name) / RECIPE).exists():
        run = RunDirectory.open(Path(name))
        recipe = run.recipe
        if not isinstance(recipe.target, HuggingFaceTarget):
            kind = TOYS.get(recipe.target.kind)
            own = "a module of your own" if kind is None else kind.about
            raise UsageError(f"{name} is a run of {own}, which knows no facts", "give a language model")
        device = device or recipe.device
        name, dtype = recipe.target.model, recipe.target.dtype
        begin_token = None if recipe.data is None else recipe.data.begin_token
    language_model = load_model(name, dtype)
    language_model.model.to(choose_device(device or "auto"))
    target = build_target(language_model, False)
    if run is not None:
        require_same_weights(run.path, target)
    begins = begins_texts(language_model.tokenizer, begin_token)
    return NamedModel(target, language_model.tokenizer, name, begins)
