"""From a recipe to the things a command works on: the target, its data, a decomposition to train.

A *subject* is a target together with what is specific to its kind: how its batches are drawn, how its tokens
are written, how its matrices hang on the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spdcli.allocator import keep_freed_memory
from spdcli.engine.forward import clean_pass
from spdcli.engine.importance import Importances, ImportanceSettings, span_basis
from spdcli.engine.subcomponents import Decomposition, Slices, start_slices
from spdcli.engine.target import Batch, Target
from spdcli.errors import SpdError
from spdcli.recipe.schema import HuggingFaceTarget, InductionTarget, Recipe
from spdcli.runs.directory import TOY_WEIGHTS, load_tensors
from spdcli.runs.settings import optimiser_settings
from spdcli.targets.broad_text import draw_stream, ridged, second_moments
from spdcli.targets.induction import InductionToy, ToyShape, toy_routes, toy_target, train_toy
from spdcli.targets.routes import Route
from spdcli.targets.sequences import induction_batch, token_name

if TYPE_CHECKING:
    from spdcli.targets.prompts import Prompts

START_SEQUENCES = 64  # toy sequences whose inputs give the data's span


@dataclass(eq=False)
class Subject:
    """A target in its setting.

    `batches(generator)` draws a training minibatch (the same object every time for a fixed set of prompts);
    `length` is the longest sequence. `prompts` is set for a language model, `toy` for the toy; `stream` draws the
    broad text that a recipe names beside its prompts, the same one every time.
    """

    target: Target
    batches: Callable[[torch.Generator], Batch]
    length: int
    token_text: Callable[[int], str]
    routes: dict[str, Route]
    toy: InductionToy | None = None
    prompts: Prompts | None = None
    stream: Callable[[], Batch] | None = None


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


def toy_training(recipe: Recipe, device: torch.device) -> Iterator[tuple[InductionToy, dict[str, float]]]:
    """Trains the toy of a recipe; yields the toy and a record at every logged step (see `train_toy`)."""
    assert isinstance(recipe.target, InductionTarget)
    assert recipe.train is not None
    return train_toy(
        toy_shape(recipe.target),
        optimiser_settings(recipe.train),
        recipe.train.batch,
        recipe.train.steps,
        recipe.seed,
        recipe.train.log_every,
        device,
    )


def load_toy(directory: Path, target: InductionTarget, device: torch.device) -> InductionToy:
    """The toy that a run of `spd train` left in `directory`, checked against the recipe's shape."""
    tensors, _ = load_tensors(directory / TOY_WEIGHTS)
    toy = InductionToy(toy_shape(target))
    wanted = {name: tensor.shape for name, tensor in toy.state_dict().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        raise SpdError(
            f"{directory / TOY_WEIGHTS}: not the toy that [target] describes", "give the recipe it was trained by"
        )
    toy.load_state_dict(tensors)
    return toy.to(device).eval()


def toy_subject(recipe: Recipe, toy: InductionToy) -> Subject:
    shape = toy.shape

    def batches(generator: torch.Generator) -> Batch:
        drawn = induction_batch(recipe.decompose.batch, shape.length, shape.vocabulary, generator)
        if not recipe.losses.last_token_only:
            drawn = replace(drawn, looked=drawn.valid)
        return drawn.to(next(toy.parameters()).device)

    return Subject(
        target=toy_target(toy),
        batches=batches,
        length=shape.length,
        token_text=lambda token: token_name(token, shape.vocabulary),
        routes=toy_routes(toy),
        toy=toy,
    )


def language_subject(recipe: Recipe, device: torch.device, trained: bool = True) -> Subject:
    """A language model and its prompts, ready to decompose. Unless `trained`, its weights are not read: they are
    random, or on torch's `meta` device shapes alone."""
    from spdcli.targets.huggingface import build_routes, build_target, load_model, load_untrained
    from spdcli.targets.prompts import encode

    data = recipe.data
    assert isinstance(recipe.target, HuggingFaceTarget)
    assert data is not None
    name, dtype = recipe.target.model, recipe.target.dtype
    language_model = load_model(name, dtype) if trained else load_untrained(name, dtype, device)
    language_model.model.to(device)
    prompts = encode(language_model.tokenizer, data.prompts, data.answers, data.begin_token)
    whole = prompts.batch
    if recipe.losses.last_token_only:
        last = torch.zeros_like(whole.looked)
        last[torch.arange(len(last)), prompts.answer_at] = True
        whole = replace(whole, looked=last)
    fixed, size = whole.to(device), recipe.decompose.batch

    def batches(generator: torch.Generator) -> Batch:
        return fixed if size >= len(whole.tokens) else some_of(whole, size, generator).to(device)

    @cache
    def stream() -> Batch:
        assert data.stream is not None
        shape = (data.stream_sequences, data.stream_length)
        drawn = draw_stream(data.stream, language_model.model, language_model.tokenizer, *shape, recipe.seed)
        return drawn.to(device)

    split = recipe.target.split_attention
    return Subject(
        target=build_target(language_model, split),
        batches=batches,
        length=fixed.tokens.shape[1],
        token_text=language_model.token_text,
        routes=build_routes(language_model, split),
        prompts=replace(prompts, batch=fixed),
        stream=None if data.stream is None else stream,
    )


def stream_batches(recipe: Recipe, subject: Subject) -> Callable[[torch.Generator], Batch] | None:
    """What draws the broad text of a step of a targeted decomposition; None where the recipe wants none."""
    if not recipe.losses.targeted or subject.stream is None:
        return None
    device, size = subject.target.device, recipe.decompose.stream_batch
    whole = subject.stream().to(torch.device("cpu"))
    return lambda generator: some_of(whole, size, generator).to(device)


def some_of(batch: Batch, size: int, generator: torch.Generator) -> Batch:
    """`size` sequences of a batch on the processor, drawn without replacement."""
    return batch.select(torch.randperm(len(batch.tokens), generator=generator)[:size])


def open_subject(recipe: Recipe, device: torch.device, toy_directory: Path | None = None) -> Subject:
    """The subject of a recipe. A toy is read from `toy_directory` (a run of `spd train`)."""
    if isinstance(recipe.target, InductionTarget):
        assert toy_directory is not None
        return toy_subject(recipe, load_toy(toy_directory, recipe.target, device))
    return language_subject(recipe, device)


def _start_inputs(recipe: Recipe, subject: Subject, names: list[str]) -> dict[str, Tensor]:
    """The matrices' inputs at real positions, `[n, I]`: all prompts, or a draw of toy sequences."""
    if subject.prompts is not None:
        batch = subject.prompts.batch
    else:
        assert subject.toy is not None
        generator = torch.Generator().manual_seed(recipe.seed)
        shape = subject.toy.shape
        batch = induction_batch(START_SEQUENCES, shape.length, shape.vocabulary, generator).to(subject.target.device)
    clean = clean_pass(subject.target, batch, names)
    return {name: clean.inputs[name][batch.valid] for name in names}


def start_decomposition(recipe: Recipe, subject: Subject, names: list[str]) -> Decomposition:
    """A decomposition of the matrices `names` as a recipe wants it, at step 0."""
    matrices = {name: subject.target.matrices[name] for name in names}
    spanned = recipe.importance.basis == "span"
    section = recipe.slices
    inputs = moments = None
    if spanned or section.init in ("svd_span", "dual", "dual_whitened"):
        inputs = _start_inputs(recipe, subject, names)
    if section.init == "dual_whitened":
        assert subject.stream is not None
        found = second_moments(subject.target, subject.stream(), names)
        moments = {name: ridged(moment, section.ridge) for name, moment in found.items()}
    slices = start_slices(matrices, section.C, section.init, inputs, recipe.seed, moments)
    bases = {name: span_basis(inputs[name]) for name in names} if spanned and inputs is not None else None
    return _assemble(recipe, subject, slices, bases)


def _importances(recipe: Recipe, subject: Subject, names: list[str], bases: dict[str, Tensor] | None) -> Importances:
    widths = {name: subject.target.matrices[name].d_in for name in names}
    settings = ImportanceSettings(**recipe.importance.model_dump(exclude={"basis"}), length=subject.length)
    return Importances(widths, dict.fromkeys(names, recipe.slices.C), settings, bases)


def _assemble(
    recipe: Recipe, subject: Subject, slices: dict[str, Slices], bases: dict[str, Tensor] | None
) -> Decomposition:
    torch.manual_seed(recipe.seed)
    made = Decomposition(slices, _importances(recipe, subject, list(slices), bases), recipe.slices.delta)
    return made.to(subject.target.device, subject.target.unembedding.dtype)


def untrained_decomposition(recipe: Recipe, subject: Subject, names: list[str], device: torch.device) -> Decomposition:
    """The decomposition of the matrices `names` with random numbers, or on torch's `meta` device shapes alone.

    A basis of the data's span is taken to have as many directions as there are real positions.
    """
    matrices = {name: subject.target.matrices[name] for name in names}
    bases = None
    with device:
        C = recipe.slices.C
        slices = {
            name: Slices(torch.rand(m.d_in, C) / m.d_in, torch.rand(C, m.d_out) / C) for name, m in matrices.items()
        }
        if recipe.importance.basis == "span" and subject.prompts is not None:
            rows = int(subject.prompts.batch.valid.sum())
            bases = {name: torch.randn(min(m.d_in, rows), m.d_in) / math.sqrt(m.d_in) for name, m in matrices.items()}
        importances = _importances(recipe, subject, names, bases)
    return Decomposition(slices, importances, recipe.slices.delta).to(device, subject.target.unembedding.dtype)


def parameter_counts(recipe: Recipe, subject: Subject, names: list[str]) -> tuple[int, int]:
    """How many parameters the slices and the importance functions of `names` will have."""
    shapes = untrained_decomposition(recipe, subject, names, torch.device("meta"))
    trained = [p for p in shapes.importances.parameters() if p.requires_grad]
    return sum(p.numel() for p in shapes.slices.parameters()), sum(p.numel() for p in trained)


def load_decomposition(recipe: Recipe, subject: Subject, tensors: dict[str, Tensor]) -> Decomposition:
    """The decomposition that a run saved as `tensors`."""
    slices = {}
    for key in tensors:
        if key.startswith("slices.") and key.endswith(".U"):
            stem = key[: -len(".U")]
            slices[stem[len("slices.") :].replace("/", ".")] = Slices(tensors[f"{stem}.U"], tensors[f"{stem}.V"])
    unknown = [name for name in slices if name not in subject.target.matrices]
    if unknown or not slices:
        raise SpdError(f"the saved decomposition is of another target: it has {unknown[:1] or 'no slices'}")
    ordered = {name: slices[name] for name in subject.target.matrices if name in slices}
    bases = None
    if recipe.importance.basis == "span":
        bases = {name: tensors[f"importances.bases.{name.replace('.', '/')}"] for name in ordered}
    made = _assemble(recipe, subject, ordered, bases)
    try:
        made.load_state_dict(tensors)
    except RuntimeError as error:  # torch's own words are a page
        raise SpdError(
            "the saved decomposition does not fit its recipe: other slices or gates, or an older version of spd",
            "run spd decompose again",
        ) from error
    return made.requires_grad_(False).eval()
