"""Checkpoints of goodfire-ai/spd, the authors' public code: read into a run, and written from one.

Such a checkpoint is the state dict of their model. A matrix is named by the path of its module in the target, with
dashes for dots, and their letters are swapped against ours: their V reads and their U writes. G gate width.

    _components.PATH.V `[I, C]`, .U `[C, O]`          our U, V
    _ci_fns.PATH.layers.0.W, .b, layers.2.W, .b       the gates, with one hidden layer and GELU:
        mlp          `[C, 1, G]`, `[C, G]`, `[C, G, 1]`, `[C, 1]`     our scalar
        vector_mlp   `[C, I, G]`, `[C, G]`, `[C, G, 1]`, `[C, 1]`     our vector
        shared_mlp   `[I, G]`, `[G]`, `[G, C]`, `[C]`                 our shared
    _components.PATH.bias, target_model.*             the target's own

Gates of both clip by the same leaky hard sigmoid. Theirs may be in a file of torch.save, which is read as tensors alone
(`weights_only`), or in safetensors. I d_in, O d_out, C slices.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from spdcli.disk import require_regular, write_atomically
from spdcli.engine.importance import ScalarGates, SharedGates, VectorGates
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Target
from spdcli.errors import SpdError, UsageError
from spdcli.files import load_tensors, save_tensors
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.schema import HuggingFaceTarget, Recipe
from spdcli.runs.decomposition import untrained_decomposition
from spdcli.runs.loading import LoadedRun
from spdcli.runs.subject import choose_device, open_subject

COMPONENTS, GATES, TARGET = "_components.", "_ci_fns.", "target_model."
OLDER_OR_NEWER = {"ci_fn._ci_fns.": GATES, "_gates.": GATES}  # what other versions of their code call the gates
LAYERS = ("layers.0.W", "layers.0.b", "layers.2.W", "layers.2.b")
KINDS = {"scalar": "mlp", "vector": "vector_mlp", "shared": "shared_mlp"}  # our gates, by their names


@dataclass(frozen=True, eq=False)
class Component:
    """One matrix of a checkpoint in our letters: read directions `U` `[I, C]`, write directions `V` `[C, O]`, and gates
    of a `kind` of ours with parameters `w1`, `b1`, `w2`, `b2` in our shapes."""

    U: Tensor
    V: Tensor
    kind: str
    gates: Mapping[str, Tensor]

    @property
    def slices(self) -> int:
        return self.U.shape[1]

    @property
    def gate_width(self) -> int:
        return self.gates["w2"].shape[0]


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint; SpdError for a file that holds anything else."""
    require_regular(path)
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise SpdError(f"{path}: not tensors that torch.save wrote: {said[0]}", "give model_STEP.pth") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SpdError(f"{path}: not a state dict, names with tensors", "give model_STEP.pth")
    return state


def components_in(state: Mapping[str, Tensor], path: Path) -> dict[str, Component]:
    """Every matrix of a checkpoint, by its path in the target. SpdError for gates of a kind that we do not have."""
    for prefix, ours in OLDER_OR_NEWER.items():
        state = {ours + key[len(prefix) :] if key.startswith(prefix) else key: value for key, value in state.items()}
    suffix = ".V"
    names = [
        key[len(COMPONENTS) : -len(suffix)] for key in state if key.startswith(COMPONENTS) and key.endswith(suffix)
    ]
    if not names:
        raise SpdError(f"{path}: no checkpoint of goodfire-ai/spd: no tensor is called {COMPONENTS}PATH.V")
    parts = {}
    for name in names:
        layers = {key[len(GATES) + len(name) + 1 :] for key in state if key.startswith(f"{GATES}{name}.")}
        if layers != set(LAYERS):
            raise SpdError(
                f"{path}: the importance functions of {name} have {', '.join(sorted(layers)) or 'no tensors'}; "
                f"expected {', '.join(LAYERS)}",
                "spd reads mlp, vector_mlp and shared_mlp with one hidden layer",
            )
        U, V = state[f"{COMPONENTS}{name}.V"], state.get(f"{COMPONENTS}{name}.U")
        if V is None or U.dim() != 2 or V.dim() != 2 or U.shape[1] != V.shape[0]:
            raise SpdError(f"{path}: V and U of {name} do not fit each other: expected [d_in, C] and [C, d_out]")
        kind, gates = gates_in([state[f"{GATES}{name}.{layer}"] for layer in LAYERS])
        parts[name.replace("-", ".")] = Component(U, V, kind, gates)
    return parts


def gates_in(layers: list[Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Our kind of gates, and our parameters, from their W and b of two layers."""
    W1, b1, W2, b2 = layers
    if W1.dim() == 2:
        return "shared", {"w1": W1, "b1": b1, "w2": W2, "b2": b2}
    w2, b2 = W2[:, :, 0].t(), b2[:, 0]
    if W1.shape[1] == 1:
        return "scalar", {"w1": W1[:, 0].t(), "b1": b1.t(), "w2": w2, "b2": b2}
    return "vector", {"w1": W1.permute(1, 2, 0).flatten(1), "b1": b1.t().flatten(), "w2": w2, "b2": b2}


def module_paths(target: Target) -> dict[str, str]:
    """The path in the target of every matrix that is a whole module, by the matrix's name."""
    paths = {module: path for path, module in target.model.named_modules()}
    whole = [
        m
        for m in target.matrices.values()
        if m.columns == (0, m.module.get_parameter("weight").shape[1 - m.transposed])
    ]
    return {matrix.name: paths[matrix.module] for matrix in whole}


def import_run(recipe: Recipe, path: Path, device: str | None = None, report: Report = silent) -> LoadedRun:
    """A run, in memory, with the decomposition that the checkpoint at `path` has of a recipe's language model.

    Number of slices, matrices and importance functions are the checkpoint's, all else is the recipe's. A matrix with
    fewer slices than another gets slices that are zero and switched off. What spd does not decompose (embeddings) is
    left out, with a warning. SpdError where no matrix fits the target.
    """
    if not isinstance(recipe.target, HuggingFaceTarget):
        raise UsageError("a checkpoint is imported for a language model", "give a recipe whose target is one")
    parts = components_in(read_state(path), path)
    subject = open_subject(recipe, choose_device(device or recipe.device))
    names = {module: name for name, module in module_paths(subject.target).items()}
    ours = {names[module]: part for module, part in parts.items() if module in names}
    strange = [module for module in parts if module not in names]
    if not ours:
        raise SpdError(
            f"{path} decomposes {strange[0]}, which {recipe.target.model} does not have",
            f"its matrices are {', '.join(list(names)[:4])} …",
        )
    if strange:
        report(
            Progress(f"{len(strange)} modules are left out, as {strange[0]}: spd does not decompose them", warning=True)
        )
    recipe = imported_recipe(recipe, ours, path)
    ordered = [name for name in subject.target.matrices if name in ours]
    decomposition = untrained_decomposition(recipe, subject, ordered, subject.target.device)
    state = decomposition.state_dict()
    for name in ordered:
        fill(state, name, ours[name], recipe.slices.C, path)
    decomposition.load_state_dict(state)
    return LoadedRun(None, recipe, subject, decomposition.requires_grad_(False).eval())


def imported_recipe(recipe: Recipe, parts: Mapping[str, Component], path: Path) -> Recipe:
    """The recipe with what the checkpoint says; SpdError where its matrices have gates of several kinds or widths, and
    UsageError where the recipe says what these cannot have."""
    shapes = {(part.kind, part.gate_width) for part in parts.values()}
    if len(shapes) > 1:
        raise SpdError(f"{path}: importance functions of several kinds or widths, {sorted(shapes)}; a run has one")
    ((kind, width),) = shapes
    own = recipe.model_dump()
    own["slices"] |= {"C": max(part.slices for part in parts.values()), "matrices": list(parts)}
    gates = {"kind": kind, "gate_width": width, "activation": "gelu", "normalise": "none", "basis": "full"}
    own["importance"] |= gates
    try:
        return Recipe.model_validate(own)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(f"the recipe does not go with {path}: {said}", "--set changes a setting of it") from error


def fill(state: dict[str, Tensor], name: str, part: Component, slices: int, path: Path) -> None:
    """Put a matrix's part into the state of a decomposition; the slices beyond its own stay off."""
    key, spare = name.replace(".", "/"), slices - part.slices
    tensors = {
        f"slices.{key}.U": F.pad(part.U, (0, spare)),
        f"slices.{key}.V": F.pad(part.V, (0, 0, 0, spare)),
        f"importances.alive.{key}": torch.arange(slices) < part.slices,
    }
    for letter, gate in part.gates.items():
        width = part.gate_width
        flat = part.kind == "vector" and letter in ("w1", "b1")
        shared = part.kind == "shared" and letter in ("w1", "b1")
        wide = gate.unflatten(-1, (width, part.slices)) if flat else gate
        padded = wide if shared else F.pad(wide, (0, spare))
        tensors[f"importances.gates.{key}.{letter}"] = padded.flatten(-2) if flat else padded
    for place, tensor in tensors.items():
        if state[place].shape != tensor.shape:
            raise SpdError(
                f"{path}: {name} has shape {tuple(tensor.shape)} where the target needs {tuple(state[place].shape)}",
                "is it of this target?",
            )
        state[place] = tensor.to(state[place])


def exported_state(run: LoadedRun) -> dict[str, Tensor]:
    """A run's decomposition and target as their state dict. UsageError for what their code cannot hold.

    Pruned slices and gates in the span of the prompts are written as the functions that they are.
    """
    settings, target, decomposition = run.recipe.importance, run.subject.target, run.decomposition
    if settings.kind not in KINDS or settings.activation != "gelu" or settings.normalise != "none":
        raise UsageError(
            f"importance functions of kind {settings.kind}, activation {settings.activation} and normalise "
            f"{settings.normalise} have no form in goodfire-ai/spd",
            f"it has {', '.join(KINDS)} with gelu and no norm",
        )
    paths = module_paths(target)
    state: dict[str, Tensor] = {}
    for name in decomposition.names:
        if name not in paths:
            raise UsageError(f"{name} is a part of a module, and goodfire-ai/spd decomposes whole ones")
        own, path = decomposition.of(name), paths[name].replace(".", "-")
        state |= {f"{COMPONENTS}{path}.V": own.U, f"{COMPONENTS}{path}.U": own.V}
        bias = target.matrices[name].bias
        state |= {} if bias is None else {f"{COMPONENTS}{path}.bias": bias}
        for layer, tensor in zip(LAYERS, exported_gates(decomposition, name), strict=True):
            state[f"{GATES}{path}.{layer}"] = tensor
    state |= {f"{TARGET}{name}": value for name, value in target.model.state_dict().items()}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def exported_gates(decomposition: Decomposition, name: str) -> list[Tensor]:
    """Their W and b of two layers, of the gates of one matrix."""
    key, functions = name.replace(".", "/"), decomposition.importances
    gates = functions.gates[key]
    assert isinstance(gates, VectorGates | ScalarGates | SharedGates)
    w1, b1 = gates.w1, gates.b1
    w2, b2 = gates.last_layer(functions.alive[key])
    if isinstance(gates, VectorGates | SharedGates) and functions.bases:
        w1 = functions.bases[key].t() @ w1  # of x @ basis.T, as a function of x
    if isinstance(gates, SharedGates):
        return [w1, b1, w2, b2]
    last = [w2.t()[:, :, None], b2[:, None]]
    if isinstance(gates, ScalarGates):
        return [w1.t()[:, None], b1.t(), *last]
    return [w1.unflatten(1, w2.shape).permute(2, 0, 1), b1.view(w2.shape).t(), *last]


def export_run(run: LoadedRun, path: Path, force: bool = False) -> None:
    """Write a run as their checkpoint: safetensors where `path` ends so, else as torch.save does.

    UsageError for a file that is there, unless `force` replaces it.
    """
    if path.exists() and not force:
        raise UsageError(f"{path} is there already", "--force replaces it, or name another with --out")
    state = exported_state(run)
    if path.suffix == ".safetensors":
        save_tensors(path, state)
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, lambda new: new.write_bytes(buffer.getvalue()))
