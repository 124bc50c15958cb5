"""From a recipe to the things a command works on: the target, its data, a decomposition to train.

A *subject* is a target together with what is specific to its kind: how its batches are drawn, how its tokens
are written, how its matrices hang on the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spdcli.engine.fit import FitState
from spdcli.engine.target import Batch, Batches, Target
from spdcli.errors import SpdError, UsageError
from spdcli.files import load_tensors
from spdcli.machine import keep_freed_memory
from spdcli.progress import Report, silent
from spdcli.recipe.planted import PlantedInductionTarget, PlantedLookupTarget
from spdcli.recipe.schema import (
    HuggingFaceTarget,
    InductionTarget,
    ModuleTarget,
    Recipe,
    ResidMLPTarget,
    TMSTarget,
    ToyTarget,
)
from spdcli.runs.contents import of_module
from spdcli.runs.directory import TOY_WEIGHTS
from spdcli.runs.settings import optimiser_settings
from spdcli.targets.feature_toys import TMS, FeatureToy, ResidMLP, ResidMLPShape, TMSShape, feature_target
from spdcli.targets.feature_training import train_feature_toy
from spdcli.targets.induction import InductionToy, ToyShape, toy_routes, toy_target, train_toy
from spdcli.targets.planted import Planted
from spdcli.targets.routes import Route
from spdcli.targets.sparse_features import sparse_features
from spdcli.targets.toy_state import start_toy

if TYPE_CHECKING:
    from spdcli.targets.prompts import Prompts
    from spdcli.targets.text_windows import TextSplit

Toy = InductionToy | FeatureToy
ToyRecord = dict[str, float]  # of a logged step of a toy's training: its step, loss, rate and what else it tells


@dataclass(eq=False)
class Subject:
    """A target with the data that it is decomposed on, and the names of its tokens.

    `batches(generator, step)` gives a training minibatch. Where every step takes all of a fixed set of prompts, it
    returns the same object each time, so that what is worked out from it once can be kept. `length` is that of the
    longest sequence. `token_text(token)` is a token as text; `routes[m]` says how matrix m is labelled with tokens.
    `toy` is set for the induction toy, `feature_toy` for a toy of sparse features, `prompts` for every other target;
    `planted` for one whose slices are known. `draw(count, generator)` gives fresh data of a toy, on the processor.
    `corpus()` is the text (`data.stream`) if the recipe has any; `stream()` gives some of its training sequences, the
    same ones on every call, and `held_out()` some that nothing is trained on. Where the recipe has text and no prompts,
    `prompts` are a few of these, and `held_out_prompts(n)` the first n of them.
    """

    target: Target
    batches: Batches
    length: int
    token_text: Callable[[int], str]
    routes: dict[str, Route]
    toy: InductionToy | None = None
    prompts: Prompts | None = None
    stream: Callable[[], Batch] | None = None
    planted: Planted | None = None
    held_out: Callable[[], Batch] | None = None
    feature_toy: FeatureToy | None = None
    draw: Callable[[int, torch.Generator], Batch] | None = None
    corpus: Callable[[], TextSplit] | None = None
    held_out_prompts: Callable[[int], Prompts] | None = None

    @property
    def trained_toy(self) -> Toy | None:
        """The model that was trained on the spot, where there is one."""
        return self.toy or self.feature_toy


def require_tokens(subject: Subject) -> None:
    """UsageError for a toy of sparse features, which neither reads nor predicts tokens."""
    if subject.feature_toy is not None:
        raise UsageError(
            "a toy of sparse features has no tokens, so it has no prompts, answers or facts",
            "spd eval, inspect, explore, report, ablate and svd look at its features",
        )


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU when there is one; asking for one that is not there is an error.

    On the processor the allocator is told to keep freed memory, before the work begins.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SpdError("device = 'cuda', but torch sees no GPU here", "--device cpu, or install a CUDA build of torch")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def toy_shape(target: InductionTarget) -> ToyShape:
    return ToyShape(**target.model_dump(exclude={"kind", "path"}))


def empty_toy(target: ToyTarget) -> Toy:
    """A toy as `target` describes it, with the weights that its training starts from."""
    if isinstance(target, InductionTarget):
        return InductionToy(toy_shape(target))
    shape = target.model_dump(exclude={"kind", "path", "feature_probability"})
    return TMS(TMSShape(**shape)) if isinstance(target, TMSTarget) else ResidMLP(ResidMLPShape(**shape))


def begin_toy(recipe: Recipe, device: torch.device) -> tuple[Toy, FitState]:
    """The toy of a recipe at step 0, and the state of its training."""
    assert recipe.train is not None
    make = partial(empty_toy, recipe.target)  # type: ignore[arg-type]
    return start_toy(make, optimiser_settings(recipe.train), recipe.seed, device)


def toy_training(recipe: Recipe, toy: Toy, state: FitState) -> Iterator[ToyRecord | None]:
    """Trains the toy of a recipe; yields after every step, a record at a logged one (see `train_toy`)."""
    target, section = recipe.target, recipe.train
    assert section is not None
    if isinstance(toy, InductionToy):
        return train_toy(toy, state, section.batch, section.steps, section.log_every)
    assert isinstance(target, TMSTarget | ResidMLPTarget)
    return train_feature_toy(toy, state, target.feature_probability, section.batch, section.steps, section.log_every)


def load_toy(directory: Path, target: ToyTarget, device: torch.device) -> Toy:
    """The toy that a run of `spd train` left in `directory`, checked against the recipe's shape."""
    toy = empty_toy(target)
    hint = f"give the recipe it was trained by; if it is damaged, remove {directory / TOY_WEIGHTS} and train it again"
    tensors, _ = load_tensors(directory / TOY_WEIGHTS, lambda found: of_module(toy), hint)
    toy.load_state_dict(tensors)
    return toy.to(device).eval()


def toy_subject(recipe: Recipe, toy: Toy) -> Subject:
    """A toy with the data that it is decomposed on."""
    if isinstance(toy, FeatureToy):
        return feature_subject(recipe, toy)
    shape = toy.shape

    def batches(generator: torch.Generator, number: int = 0) -> Batch:
        drawn = shape.sequences.draw(recipe.decompose.batch, generator)
        if not recipe.losses.last_token_only:
            drawn = replace(drawn, looked=drawn.valid)
        return drawn.to(next(toy.parameters()).device)

    return Subject(
        target=toy_target(toy),
        batches=batches,
        length=shape.length,
        token_text=shape.sequences.name,
        routes=toy_routes(toy),
        toy=toy,
        draw=shape.sequences.draw,
    )


def feature_subject(recipe: Recipe, toy: FeatureToy) -> Subject:
    """A toy of sparse features, whose inputs have one position; the names of its features are their numbers."""
    assert isinstance(recipe.target, TMSTarget | ResidMLPTarget)
    probability, target = recipe.target.feature_probability, feature_target(toy)
    draw = lambda count, generator: sparse_features(count, toy.features, probability, toy.lowest, generator)  # noqa: E731

    def batches(generator: torch.Generator, number: int = 0) -> Batch:
        return draw(recipe.decompose.batch, generator).to(target.device)

    return Subject(
        target=target,
        batches=batches,
        length=1,
        token_text=str,
        routes=toy.routes(),
        feature_toy=toy,
        draw=draw,
    )


def language_subject(recipe: Recipe, device: torch.device, trained: bool = True, report: Report = silent) -> Subject:
    """A language model and its data, ready to decompose. Unless `trained`, its weights are not read: they are random,
    or on torch's `meta` device shapes alone."""
    from spdcli.runs.text_data import with_data
    from spdcli.targets.huggingface import build_target, load_model, load_untrained
    from spdcli.targets.language_routes import build_routes

    assert isinstance(recipe.target, HuggingFaceTarget)
    name, dtype, split = recipe.target.model, recipe.target.dtype, recipe.target.split_attention
    language_model = load_model(name, dtype) if trained else load_untrained(name, dtype, device)
    language_model.model.to(device)
    subject = Subject(
        target=build_target(language_model, split),
        batches=no_data,
        length=0,
        token_text=language_model.token_text,
        routes=build_routes(language_model, split),
    )
    return with_data(recipe, subject, language_model, trained, report)


def no_data(generator: torch.Generator, number: int = 0) -> Batch:
    """The minibatches of a target that has no data yet."""
    raise AssertionError("a language model is given its data before anything is drawn")


def some_of(batch: Batch, size: int, generator: torch.Generator) -> Batch:
    """`size` sequences of a batch on the processor, drawn without replacement."""
    return batch.select(torch.randperm(len(batch.tokens), generator=generator)[:size])


def open_subject(
    recipe: Recipe,
    device: torch.device,
    toy_directory: Path | None = None,
    toy: Toy | None = None,
    report: Report = silent,
) -> Subject:
    """The subject of a recipe. Unless `toy` is one, a toy is read from `toy_directory` (a run of `spd train`)."""
    if isinstance(recipe.target, ToyTarget):
        if toy is None:
            assert toy_directory is not None
            toy = load_toy(toy_directory, recipe.target, device)
        return toy_subject(recipe, toy)
    if isinstance(recipe.target, ModuleTarget):
        raise SpdError(
            "the target of this recipe is a module of somebody's own, which only Python has",
            "spdcli.load(path, target=spdcli.module_target(...), data=tokens), or spdcli.decompose likewise",
        )
    if isinstance(recipe.target, PlantedInductionTarget | PlantedLookupTarget):
        from spdcli.runs.planted_subject import planted_subject

        return planted_subject(recipe, device)
    return language_subject(recipe, device, report=report)
