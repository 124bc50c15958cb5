"""Where the target needs each matrix: what is lost when the matrix writes nothing there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spdcli.measures.circuit_data import CircuitData


@torch.no_grad()
def needs(data: CircuitData) -> dict[str, dict[str, float]]:
    """KL(target ‖ target without matrix m at a position class) in nats, by matrix and class, at the last query.

    Every other matrix and position stays as it is, and position encodings stay where they are: of a toy whose encodings
    come after Q0, a silent Q0 leaves the query its encoding. No slice is looked at: this is what a decomposition can at
    best have to be active for.
    """
    batch, toy = data.clean.batch, data.toy
    with_all = toy.logits(batch.tokens).double().log_softmax(-1)
    losses: dict[str, dict[str, float]] = {}
    for name, matrix in data.target.matrices.items():
        losses[name] = {}
        for kind, positions in batch.classes.items():
            with _silent(matrix.module, positions):
                without = toy.logits(batch.tokens).double().log_softmax(-1)
            losses[name][kind] = (with_all.exp() * (with_all - without)).sum(-1).mean().item()
    return losses


@contextmanager
def _silent(module: nn.Module, positions: Tensor) -> Iterator[None]:
    """While open, `module` writes zeros at `positions` `[B, T]`; it may be run at the last ones alone."""

    def silence(module: nn.Module, inputs: object, out: Tensor) -> Tensor:
        return out.masked_fill(positions[:, -out.shape[1] :, None], 0)

    handle = module.register_forward_hook(silence)
    try:
        yield
    finally:
        handle.remove()
