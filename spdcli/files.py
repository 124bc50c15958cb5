"""Tensors in files: safetensors, whole or not at all, with a checksum of what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spdcli.disk import write_atomically
from spdcli.errors import Missing, SpdError

CHECKSUM = "checksum"  # the metadata's key of it


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, before: Path | None = None
) -> None:
    """Write a safetensors file atomically; the one that was there is kept as `before`, where that is given."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {**(metadata or {}), CHECKSUM: checksum(kept)}
    write_atomically(path, lambda new: save_file(kept, new, about), before=before)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; SpdError when it is missing or damaged.

    Of a file without a checksum, as others write it, only a damage of its form is noticed.
    """
    try:
        path.open("rb").close()  # safetensors takes a file that may not be read for one that is not there
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise Missing(f"{path}: no such file", "is this a finished run?") from error
    except PermissionError as error:
        raise SpdError(f"{path}: cannot be read: {error.strerror}", "ask its owner") from error
    except (SafetensorError, OSError) as error:
        raise SpdError(f"{path}: damaged: {error}", "go on from the checkpoint with --resume, or run again") from error
    if metadata.pop(CHECKSUM, None) not in (None, checksum(tensors)):
        raise SpdError(
            f"{path}: damaged: its numbers are not those that were written",
            "go on from the checkpoint with --resume, or run again",
        )
    return tensors, metadata


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits that stand for the names, types, shapes and numbers of `tensors`."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
