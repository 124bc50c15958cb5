"""A target's own module answering with masked slices: for forward passes that are not the engine's.

The module stays the one that it is, so that hooks of other tools see the masked model. Letters: B sequences,
T positions, C slices of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spdcli.engine.forward import clean_pass
from spdcli.engine.loss_choices import OUTPUT_LOSSES
from spdcli.engine.product import MaskedRows
from spdcli.engine.replacement import replaced
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Batch, Target
from spdcli.errors import UsageError

Masks = Mapping[str, Tensor]
MasksOf = Callable[[Batch], Masks]  # the masks of a batch of tokens, by matrix


@contextmanager
def masked_module(target: Target, decomposition: Decomposition, masks_of: MasksOf, delta: float) -> Iterator[None]:
    """While open, `target.model` answers with each matrix that `masks_of` names replaced by its masked slices.

    `masks_of(batch)` gives a mask `[C]`, `[T, C]` or `[B, T, C]` a matrix for the tokens that the module is called
    with; other matrices are the target's own. `delta` multiplies `W - U V`: 0 leaves slices alone, 1 makes masks of 1
    the target itself. UsageError for a call that continues a cache, which has no whole sequence.
    """
    model, calls = target.model, ExitStack()
    busy = False  # while the importances are worked out, by the same module for some targets

    def open_masks(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal busy
        if busy:
            return
        batch = batch_of(args, kwargs) if OUTPUT_LOSSES[target.output_loss].distributions else vectors_of(args)
        busy = True
        try:
            masks = masks_of(batch)
        finally:
            busy = False
        calls.enter_context(replaced(target, decomposition, masked_rows(decomposition, masks, batch, delta)))

    def close_masks(module: nn.Module, args: tuple, output: object) -> None:
        if not busy:
            calls.close()

    handles = [
        model.register_forward_pre_hook(open_masks, with_kwargs=True),
        model.register_forward_hook(close_masks, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        calls.close()


def vectors_of(args: tuple) -> Batch:
    """The vectors `[B, T, N]` that the module of a target without tokens is called with."""
    if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3:
        raise UsageError("a masked toy of features is called with vectors [B, 1, features]")
    return Batch.everywhere(args[0])


def batch_of(args: tuple, kwargs: Mapping[str, Any]) -> Batch:
    """The tokens `[B, T]` that a module is called with: its first argument, or `input_ids`; padding by its mask."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise UsageError("a masked model is called with token ids [B, T]", "run.tokens(text)[None] makes them")
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UsageError("a masked model sees whole sequences, not the rest of a cached one", "use_cache=False")
    valid = torch.ones_like(tokens, dtype=torch.bool)
    if kwargs.get("attention_mask") is not None:
        valid = kwargs["attention_mask"].bool()
        if bool((valid[:, :-1] < valid[:, 1:]).any()):
            raise UsageError("padding stands before tokens; a masked model takes it at the end", "padding_side='right'")
    return Batch(tokens, valid, valid)


def importance_masks_of(target: Target, decomposition: Decomposition) -> MasksOf:
    """The masks of active slices alone: every slice by its importance g, from what the target does on the tokens."""

    @torch.no_grad()
    def masks_of(batch: Batch) -> Masks:
        clean = clean_pass(target, batch, decomposition.names)
        return decomposition.importance(clean.inputs, clean.padding)[0]

    return masks_of


def masked_rows(decomposition: Decomposition, masks: Masks, batch: Batch, delta: float) -> dict[str, MaskedRows]:
    """The masks of every matrix in `masks`, on all sequences of a batch. UsageError for masks of other shapes."""
    sequences, positions = batch.valid.shape
    rows = torch.arange(sequences, device=batch.tokens.device)
    by_matrix = {}
    for name, mask in masks.items():
        if name not in decomposition.names:
            raise UsageError(
                f"no decomposed matrix is called {name!r}", f"they are {', '.join(decomposition.names[:6])}"
            )
        U = decomposition.of(name).U
        if not isinstance(mask, Tensor) or not mask.dim():
            raise UsageError(f"the mask of {name} is no tensor [C], [T, C] or [B, T, C]")
        mask = mask.to(U)
        whole = (sequences, positions, U.shape[1])
        try:
            mask = mask.expand(whole)
        except RuntimeError:
            raise UsageError(
                f"a mask of {name} is of shape {tuple(mask.shape)}; expected [C], [T, C] or [B, T, C] of {whole}"
            ) from None
        share = mask.new_full((sequences, positions, 1), delta) if delta else None
        by_matrix[name] = MaskedRows(rows, mask, share)
    return by_matrix
