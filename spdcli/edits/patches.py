"""Patch files: an edit alone, which applies to its base and comes off again bit for bit.

A patch is one safetensors file. For every touched matrix m it holds

    read.m, write.m   the rank-1 factors, float64: W' = W − read @ write, as `suppression.subtract` computes it
    restore.m         what W' + read @ write, rounded, is short of W, in units of the last place (uint8, compressed)

Floating point subtraction does not invert exactly, but it misses by little: nearly all of `restore` is 0 or ±1, which
compresses to a fraction of a byte a weight, where the original weights would take all of theirs. Both directions are
sequences of single rounded operations, so that they give the same bits everywhere; and both are checked: the metadata
has the sha256 of each touched weight before and after, by which another base is refused.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spdcli.edits.suppression import Edit, Factors, subtract
from spdcli.engine.target import Target
from spdcli.errors import Missing, SpdError
from spdcli.files import load_tensors, save_tensors
from spdcli.records import plain

FORMAT = 1
KEY = "spd.patch"  # of the metadata
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a weight
Weights = dict[str, Tensor]  # `[I, O]` by matrix, on the CPU


@dataclass(frozen=True, eq=False)
class Patch:
    """An edit with what takes it off again; `about` is the metadata, with `before` and `after` hashes by matrix."""

    edit: Edit
    restore: Mapping[str, Tensor]
    about: Mapping[str, Any]

    def hashes(self, when: str) -> dict[str, str]:
        """The sha256 of every touched weight; `when` is before or after."""
        return {name: entry[when] for name, entry in self.about["matrices"].items()}


def weight_hash(weight: Tensor) -> str:
    """sha256 of a weight's bytes as `[I, O]`, row by row."""
    return hashlib.sha256(_bytes(weight)).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def touched_weights(target: Target, edit: Edit) -> Weights:
    """Copies of the weights that an edit changes."""
    return {name: target.matrices[name].stored.detach().cpu().clone() for name in edit}


def edited_weights(target: Target, edit: Edit) -> Weights:
    """What those weights are after the edit."""
    return {name: subtract(weight, edit[name]) for name, weight in touched_weights(target, edit).items()}


def set_weights(target: Target, weights: Mapping[str, Tensor]) -> None:
    """Put `weights` into the target's own modules."""
    for name, weight in weights.items():
        target.matrices[name].store(weight)


def negative(factors: Factors) -> Factors:
    """The edit that adds what `factors` removes."""
    return Factors(factors.read, -factors.write)


def shortfall(before: Tensor, after: Tensor, factors: Factors) -> Tensor:
    """`restore` of one matrix: the bits of W minus those of W' + read @ write as integers, compressed, uint8 `[n]`.

    Zigzag coding maps 0, −1, 1, −2 … to 0, 1, 2, 3 …; the bytes of one significance lie together.
    """
    back = subtract(after, negative(factors))
    size = before.element_size()
    gap = _integers(before) - _integers(back)
    coded = (gap << 1) ^ (gap >> (8 * size - 1))
    planes = np.ascontiguousarray(coded.numpy().view(np.uint8).reshape(-1, size).T)
    return torch.frombuffer(bytearray(zlib.compress(planes.tobytes(), 9)), dtype=torch.uint8)


def restored(after: Tensor, factors: Factors, restore: Tensor) -> Tensor:
    """W from W': what `shortfall` undoes. ValueError when `restore` is not of a weight of this shape."""
    back = subtract(after, negative(factors))
    size = after.element_size()
    try:
        # One byte more than fits is enough to see that it does not, whatever the rest would grow to.
        planes = zlib.decompressobj().decompress(restore.numpy().tobytes(), after.numel() * size + 1)
    except zlib.error as error:
        raise ValueError(f"not compressed bytes: {error}") from error
    if len(planes) != after.numel() * size:
        raise ValueError("of another shape")
    raw = np.frombuffer(planes, np.uint8).reshape(size, -1).T.copy()
    coded = torch.from_numpy(raw).view(INTEGERS[size])[:, 0]
    # The sign bit is shifted in by >>: masking it off makes the shift the logical one that zigzag needs.
    gap = ((coded >> 1) & torch.iinfo(coded.dtype).max) ^ -(coded & 1)
    return (_integers(back) + gap).view(after.dtype).view(after.shape)


def _integers(weight: Tensor) -> Tensor:
    return weight.contiguous().view(INTEGERS[weight.element_size()]).flatten()


def make_patch(target: Target, edit: Edit, slices: Sequence[str], evidence: Mapping[str, Any]) -> Patch:
    """The patch of an edit of `target`, which is not changed; `evidence` is kept in the metadata as it is."""
    restore, matrices = {}, {}
    for name, before in touched_weights(target, edit).items():
        after = subtract(before, edit[name])
        restore[name] = shortfall(before, after, edit[name])
        matrices[name] = {"before": weight_hash(before), "after": weight_hash(after), "dtype": str(before.dtype)}
    about = {"format": FORMAT, "slices": list(slices), "matrices": matrices, "evidence": plain(evidence)}
    return Patch(edit, restore, about)


def save_patch(path: Path, patch: Patch) -> None:
    """Write a patch atomically."""
    tensors: dict[str, Tensor] = {}
    for name, factors in patch.edit.items():
        tensors |= {
            f"read.{name}": factors.read,
            f"write.{name}": factors.write,
            f"restore.{name}": patch.restore[name],
        }
    save_tensors(path, tensors, {KEY: json.dumps(patch.about, allow_nan=False)})


def load_patch(path: Path) -> Patch:
    """A patch file. SpdError, one line, for a file that is missing, damaged or none."""
    if not path.exists():
        raise Missing(f"{path}: no such file", "spd suppress RUN --slice ADDRESS --patch FILE writes one")
    try:
        tensors, metadata = load_tensors(path)
    except SpdError as error:
        raise _damaged(path, "not a safetensors file, or cut short") from error
    if KEY not in metadata:
        raise SpdError(f"{path}: no patch of spd suppress")
    try:
        about = json.loads(metadata[KEY])
        if about["format"] != FORMAT:
            raise SpdError(f"{path}: a patch of format {about['format']}; this spd reads format {FORMAT}")
        patch = Patch(
            {name: Factors(tensors[f"read.{name}"], tensors[f"write.{name}"]) for name in about["matrices"]},
            {name: tensors[f"restore.{name}"] for name in about["matrices"]},
            about,
        )
        if not patch.edit or not (patch.hashes("before") and patch.hashes("after")):
            raise KeyError("matrices")
        return patch
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its parts are not all there ({type(error).__name__}: {error})") from error


def _damaged(path: Path, why: str) -> SpdError:
    return SpdError(f"{path}: damaged: {why}", "write it again with --patch")


def applied(target: Target, patch: Patch, path: Path) -> Weights:
    """The touched weights with the edit; SpdError unless the target is the base that the patch was made on."""
    weights = _checked_base(target, patch, path, "before", "after")
    after = {name: subtract(weight, patch.edit[name]) for name, weight in weights.items()}
    return _checked_result(after, patch.hashes("after"), path)


def reverted(target: Target, patch: Patch, path: Path) -> Weights:
    """The touched weights as they were before the edit, bit for bit; SpdError unless the target has the edit."""
    weights = _checked_base(target, patch, path, "after", "before")
    try:
        back = {name: restored(weight, patch.edit[name], patch.restore[name]) for name, weight in weights.items()}
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return _checked_result(back, patch.hashes("before"), path)


def _checked_base(target: Target, patch: Patch, path: Path, needed: str, other: str) -> Weights:
    """The target's touched weights, once their hashes are those of `needed`."""
    missing = [name for name in patch.edit if name not in target.matrices]
    if missing:
        raise SpdError(f"{path}: refused: this base has no matrix '{missing[0]}'")
    weights = touched_weights(target, patch.edit)
    hashes = {name: weight_hash(weight) for name, weight in weights.items()}
    if hashes == patch.hashes(other):
        done = "has this edit already" if other == "after" else "does not have this edit"
        raise SpdError(
            f"{path}: refused: this base {done}, in {', '.join(patch.edit)}",
            "the base is the run's own target unless --base DIR names another checkpoint",
        )
    wrong = [name for name, digest in patch.hashes(needed).items() if hashes[name] != digest]
    if wrong:
        name = wrong[0]
        raise SpdError(
            f"{path}: refused: made for another base: sha256 of {name} is {hashes[name][:12]}…, "
            f"not {patch.hashes(needed)[name][:12]}…",
            "--base DIR names another checkpoint",
        )
    for name, weight in weights.items():
        read, write = patch.edit[name]
        shapes = (read.dim() == write.dim() == 2) and read.shape[1] == write.shape[0]
        if not shapes or (read.shape[0], write.shape[1]) != weight.shape or read.dtype != torch.float64:
            raise _damaged(path, f"the factors of {name} do not fit its weight")
    return weights


def _checked_result(weights: Weights, hashes: Mapping[str, str], path: Path) -> Weights:
    for name, weight in weights.items():
        if weight_hash(weight) != hashes[name]:
            raise _damaged(path, f"it does not give the {name} that it promises")
    return weights
