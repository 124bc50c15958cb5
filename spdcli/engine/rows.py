"""What blocks and their modules take and give, by row: R rows of T positions, of B sequences and H heads."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor


def hidden_of(output: Any) -> Tensor:
    """The hidden state `[R, T, D]` in what a block, or a part of one, returns: all of it, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def by_sequence(numbers: Tensor, hidden: Tensor) -> Tensor:
    """What a module of a block reads or gives, as `[R, T, ...]`: some blocks lay their rows flat, `[R * T, ...]`.
    `hidden` `[R, T, D]` is a hidden state of the same rows."""
    return numbers.unflatten(0, hidden.shape[:2]) if numbers.dim() < hidden.dim() else numbers


def rows_of(value: Any, sequences: int, index: Tensor, by_head: Collection[str] = ()) -> Any:
    """A block's recorded argument for the rows that replay the sequences `index` `[R]` of all `sequences`.

    Tensors `[sequences, ...]` become `[R, ...]`, inside tuples, lists and dicts too; the rest passes. What all
    sequences share must have one dimension, or a first dimension of 1: `[T, D]` would be taken for B = T. A tensor that
    a dict names as one of `by_head` is `[sequences * H, ...]` and becomes `[R * H, ...]`.
    """
    if isinstance(value, Tensor):
        return value.index_select(0, index) if value.dim() >= 2 and value.shape[0] == sequences else value
    if isinstance(value, (tuple, list)):
        return type(value)(rows_of(item, sequences, index, by_head) for item in value)
    if isinstance(value, dict):
        return {
            key: _rows_of_heads(item, sequences, index) if key in by_head else rows_of(item, sequences, index, by_head)
            for key, item in value.items()
        }
    return value


def _rows_of_heads(value: Tensor | None, sequences: int, index: Tensor) -> Tensor | None:
    return None if value is None else value.unflatten(0, (sequences, -1)).index_select(0, index).flatten(0, 1)
