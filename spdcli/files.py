"""Tensors in files: safetensors, whole or not at all, with a checksum of what is in them, and checked on the way in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spdcli.disk import require_regular, write_atomically
from spdcli.errors import SpdError

CHECKSUM = "checksum"  # the metadata's key of it
Tensors = dict[str, Tensor]


class Form(NamedTuple):
    """What a tensor of a file must be: its shape (None: any) and its type (None: any floating one)."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Contents:
    """What a file of tensors holds: `required` and `optional` tensors by name, and none besides."""

    required: Mapping[str, Form]
    optional: Mapping[str, Form] = field(default_factory=dict)


Expected = Callable[[Mapping[str, Tensor]], Contents]  # what a file must hold, where some of it depends on the file


def forms(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Form]:
    """The forms of `tensors`, whose names in the file begin with `prefix`."""
    return {f"{prefix}{name}": Form(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, before: Path | None = None
) -> None:
    """Write a safetensors file atomically; the one that was there is kept as `before`, where that is given."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = dict(metadata or {})
    about[CHECKSUM] = checksum(kept, about)
    write_atomically(path, lambda new: save_file(kept, new, about), before=before)


def load_tensors(
    path: Path, expected: Expected | None = None, hint: str | None = None
) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a safetensors file. SpdError with `hint`, naming file and tensor, where it is missing or
    damaged, holds anything else than is `expected`, or a number that is not finite.

    Of a file without a checksum, as others write it, only a damage of its form is noticed.
    """
    try:
        require_regular(path)
        path.open("rb").close()  # safetensors takes a file that may not be read for one that is not there
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except PermissionError as error:
        raise SpdError(f"{path}: cannot be read: {error.strerror}", "ask its owner") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise SpdError(f"{path}: damaged: {error}", hint) from error
    except SpdError as error:
        error.hint = hint or error.hint
        raise
    if expected is not None:
        _require_forms(path, tensors, expected(tensors), hint)
    stored = metadata.pop(CHECKSUM, None)
    # Until metadata were counted, a checksum was of the tensors alone.
    if stored is not None and all(stored != checksum(tensors, counted) for counted in (metadata, {})):
        raise SpdError(f"{path}: damaged: it does not hold what was written", hint)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise SpdError(f"{path}: a number of '{name}' is not finite", hint)
    return tensors, metadata


def _require_forms(path: Path, tensors: Mapping[str, Tensor], contents: Contents, hint: str | None) -> None:
    """SpdError, naming the tensor, unless `tensors` are those of `contents`."""
    allowed = {**contents.optional, **contents.required}
    for name in sorted(contents.required.keys() - tensors.keys()):
        raise SpdError(f"{path}: lacks the tensor '{name}'", hint)
    for name, tensor in sorted(tensors.items()):
        if name not in allowed:
            raise SpdError(f"{path}: holds '{name}', which is no part of it", hint)
        shape, dtype = allowed[name]
        if shape is not None and tuple(tensor.shape) != shape:
            raise SpdError(f"{path}: '{name}' has the shape {list(tensor.shape)}, not {list(shape)}", hint)
        if tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point():
            raise SpdError(f"{path}: '{name}' holds {tensor.dtype}, not {dtype or 'floating numbers'}", hint)


def checksum_of_file(path: Path) -> str:
    """The checksum of the file at `path`, as it says itself or worked out; SpdError where it cannot be read."""
    try:
        require_regular(path)
        with safe_open(path, "pt") as file:
            stored = (file.metadata() or {}).get(CHECKSUM)
    except (SafetensorError, OSError, ValueError) as error:
        raise SpdError(f"{path}: damaged: {error}") from error
    return stored or checksum(load_tensors(path)[0])


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """32 hexadecimal digits that stand for the names, types, shapes and numbers of `tensors`, and for `metadata`."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    for key, value in sorted((metadata or {}).items()):
        digest.update(f"{key} = {value}\n".encode())
    return digest.hexdigest()
