"""The weights that a run decomposes, by hash: others in their place are noticed wherever the run is read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from spdcli.disk import read_object, write_json
from spdcli.engine.target import Target
from spdcli.errors import SpdError

FINGERPRINT = "target.json"
SCHEMA = "spd.target/1"


def weight_hashes(model: nn.Module) -> dict[str, str]:
    """16 hexadecimal digits of sha256 for the type, shape and bytes of every parameter."""
    hashes = {}
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{parameter.dtype} {tuple(parameter.shape)} ".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        hashes[name] = digest.hexdigest()[:16]
    return hashes


def keep_fingerprint(run: Path, target: Target) -> None:
    """Leave the hashes of the target's weights in a run's directory; SpdError where it has those of others."""
    if (run / FINGERPRINT).exists():
        require_same_weights(run, target)
    else:
        write_json(run / FINGERPRINT, {"schema": SCHEMA, "weights": weight_hashes(target.model)})


def require_same_weights(run: Path, target: Target) -> None:
    """SpdError, naming one that differs, unless the target has the weights that the run in a directory decomposes.

    A run of before they were kept has none to compare.
    """
    if not (run / FINGERPRINT).exists():
        return
    kept = read_object(run / FINGERPRINT).get("weights")
    if not isinstance(kept, dict):
        raise SpdError(f"{run / FINGERPRINT}: holds no weights", "remove it, and the target's weights are believed")
    now = weight_hashes(target.model)
    other = sorted(name for name in kept.keys() | now.keys() if kept.get(name) != now.get(name))
    if other:
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise SpdError(
            f"{run}: its target has other weights than when it was decomposed: {other[0]}{more}",
            "put the model back that was there, or decompose this one with --out another",
        )
