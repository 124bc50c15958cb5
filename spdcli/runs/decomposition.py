"""From a recipe to a decomposition of its target: at step 0, with random numbers, or as a run saved it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spdcli.engine.forward import clean_pass
from spdcli.engine.importance import Importances, ImportanceSettings, span_basis
from spdcli.engine.part_tables import DISTINCT, STARTS
from spdcli.engine.subcomponents import Decomposition, Slices, no_dual, start_slices
from spdcli.errors import SpdError
from spdcli.files import Contents, load_tensors
from spdcli.recipe.reading import matching
from spdcli.recipe.schema import Recipe
from spdcli.runs.contents import of_module
from spdcli.runs.fingerprint import require_same_weights
from spdcli.runs.subject import Subject
from spdcli.targets.broad_text import ridged, second_moments

START_SEQUENCES = 64  # toy sequences whose inputs give the data's span
START_POSITIONS = 4096  # sequences of one position, in place of those


def _start_inputs(recipe: Recipe, subject: Subject, names: list[str]) -> dict[str, Tensor]:
    """The matrices' inputs at real positions, `[n, I]`: all prompts, some of a corpus, or a draw of a toy's data."""
    if subject.draw is None:
        assert subject.prompts is not None
        text = subject.stream if subject.held_out_prompts is not None else None
        batch = subject.prompts.batch if text is None else text()
    else:
        sequences = START_POSITIONS if subject.length == 1 else START_SEQUENCES
        batch = subject.draw(sequences, torch.Generator().manual_seed(recipe.seed)).to(subject.target.device)
    clean = clean_pass(subject.target, batch, names)
    return {name: clean.inputs[name][batch.valid] for name in names}


def start_decomposition(recipe: Recipe, subject: Subject, names: list[str]) -> Decomposition:
    """A decomposition of the matrices `names` as a recipe wants it, at step 0."""
    matrices = {name: subject.target.matrices[name] for name in names}
    spanned = recipe.importance.basis == "span"
    section, start = recipe.slices, STARTS[recipe.slices.init]
    inputs = moments = None
    inner = recipe.importance.start == "inner"
    if spanned or inner or start.needs_inputs:
        inputs = _start_inputs(recipe, subject, names)
    if start.needs_moment:
        assert subject.stream is not None
        plain = second_moments(subject.target, subject.stream(), names)
        moments = {name: ridged(moment, section.ridge) for name, moment in plain.items()}
    distinct, fill = section.distinct, section.fill
    slices = start_slices(matrices, section.C, section.init, inputs, recipe.seed, moments, distinct, fill)
    bases = {name: span_basis(inputs[name]) for name in names} if spanned and inputs is not None else None
    decomposition = _assemble(recipe, subject, slices, bases)
    if inner and inputs is not None:
        writing = {name: own.U * own.V.any(1) for name, own in ((name, decomposition.of(name)) for name in names)}
        decomposition.importances.start_from(inputs, writing)
    return decomposition


def _importances(recipe: Recipe, subject: Subject, names: list[str], bases: dict[str, Tensor] | None) -> Importances:
    widths = {name: subject.target.matrices[name].d_in for name in names}
    settings = ImportanceSettings(**recipe.importance.model_dump(exclude={"basis"}), length=subject.length)
    return Importances(widths, dict.fromkeys(names, recipe.slices.C), settings, bases)


def _assemble(
    recipe: Recipe, subject: Subject, slices: dict[str, Slices], bases: dict[str, Tensor] | None
) -> Decomposition:
    torch.manual_seed(recipe.seed)
    decomposition = Decomposition(slices, _importances(recipe, subject, list(slices), bases), recipe.slices.delta)
    return decomposition.to(subject.target.device, subject.target.precision)


def refuse_too_few_slices(recipe: Recipe, subject: Subject, names: list[str]) -> None:
    """SpdError where a dual start will find no slice for some of the data's inputs, which the tokens tell already: what
    a matrix after the first block reads differs where what was read so far does."""
    deep = [subject.target.matrices[name] for name in names if subject.target.matrices[name].block > 0]
    section = recipe.slices
    exact = STARTS[section.init].fixed_data and section.distinct <= DISTINCT and section.fill is None
    if not exact or subject.prompts is None or not deep:
        return
    rows, valid = subject.prompts.batch.tokens.tolist(), subject.prompts.batch.valid.sum(1).tolist()
    beginnings = {tuple(row[:end]) for row, length in zip(rows, valid, strict=True) for end in range(1, length + 1)}
    room = min(recipe.slices.C, *(matrix.d_in for matrix in deep))
    if len(beginnings) > room:
        raise no_dual(len(beginnings), room)


def untrained_decomposition(
    recipe: Recipe, subject: Subject, names: list[str], device: torch.device, ranks: Mapping[str, int] | None = None
) -> Decomposition:
    """The decomposition of the matrices `names` with random numbers, or on torch's `meta` device shapes alone.

    A basis of the data's span has `ranks[m]` directions; if they are not known, as many as there are real positions.
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
            ranks = ranks or {name: min(matrix.d_in, rows) for name, matrix in matrices.items()}
            bases = {name: torch.randn(ranks[name], m.d_in) / math.sqrt(m.d_in) for name, m in matrices.items()}
        importances = _importances(recipe, subject, names, bases)
    return Decomposition(slices, importances, recipe.slices.delta).to(device, subject.target.precision)


def parameter_counts(recipe: Recipe, subject: Subject, names: list[str]) -> tuple[int, int]:
    """How many parameters the slices and the importance functions of `names` will have."""
    shapes = untrained_decomposition(recipe, subject, names, torch.device("meta"))
    trained = [p for p in shapes.importances.parameters() if p.requires_grad]
    return sum(p.numel() for p in shapes.slices.parameters()), sum(p.numel() for p in trained)


def read_decomposition(path: Path, recipe: Recipe, subject: Subject, hint: str | None = None) -> Decomposition:
    """The decomposition in the file that a run saved; SpdError with `hint` where that is not what the recipe makes,
    or the target is not the one that was decomposed."""
    names = matching(recipe.slices.matrices, subject.target.matrices)

    def expected(found: Mapping[str, Tensor]) -> Contents:
        bases = {name: found.get(f"importances.bases.{name.replace('.', '/')}") for name in names}
        ranks = {name: 1 if basis is None or not basis.dim() else basis.shape[0] for name, basis in bases.items()}
        return of_module(untrained_decomposition(recipe, subject, names, torch.device("meta"), ranks))

    require_same_weights(path.parent, subject.target)
    return load_decomposition(recipe, subject, load_tensors(path, expected, hint)[0])


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
    decomposition = _assemble(recipe, subject, ordered, bases)
    try:
        decomposition.load_state_dict(tensors)
    except RuntimeError as error:  # torch's own words are a page
        raise SpdError(
            "the saved decomposition does not fit its recipe: other slices or gates, or an older version of spd",
            "run spd decompose again",
        ) from error
    return decomposition.requires_grad_(False).eval()
