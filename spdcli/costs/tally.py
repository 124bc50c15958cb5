"""Counts what tensors cost while it is open: floating-point operations of products, bytes touched, memory alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from spdcli.costs.heap import Heap


def _attention_flops(products: int) -> Callable[..., int]:
    """Of so many products of queries with keys, or the like, in one attention; torch's table lacks the processor's."""

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        q, k = args[:2] if products == 2 else args[1:3]  # backward has the gradient first
        return products * 2 * q.numel() * k.shape[-2]

    return count


class Tally(TorchDispatchMode):
    """Watches every operation inside it, backward included, on real tensors or on tensors without storage.

    `flops` are those of matrix products and attention (two a multiply-add); `bytes` what the operations read and
    write, each on its own, as if no cache kept anything between them; `peak` the most bytes that tensors made inside
    it held at once, and `alive` what they hold now. A `heap`, if given, is asked for a block for each of them.
    """

    def __init__(self, heap: Heap | None = None) -> None:
        super().__init__()
        self.heap = heap
        self.flops = self.bytes = self.operations = 0
        self.alive = self.peak = 0
        self._known = WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.note(function, args, kwargs, out)
        return out

    def note(self, function: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count one operation that has been done."""
        if getattr(function, "is_view", False) or not hasattr(function, "overloadpacket"):
            return
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        packet = function.overloadpacket
        count = PROCESSOR_ATTENTION.get(packet, flop_registry.get(packet))
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        self.operations += 1
        self.bytes += sum(size_of(t) for t in _read_and_written(packet, inputs, outputs))
        old = {id(t.untyped_storage()) for t in inputs}
        for tensor in outputs:
            if id(tensor.untyped_storage()) not in old:
                self._see(tensor.untyped_storage())

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        block = None if self.heap is None else self.heap.take(size)
        weakref.finalize(storage, self._forget, size, block)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _forget(self, size: int, block: int | None) -> None:
        self.alive -= size
        if self.heap is not None and block is not None:
            self.heap.give_back(block)


PROCESSOR_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops(2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_flops(5),
}


PICKING = {torch.ops.aten.index_select, torch.ops.aten.gather, torch.ops.aten.index, torch.ops.aten.embedding}
PLACING = {torch.ops.aten.index_copy_: 1, torch.ops.aten.index_add_: 2}  # what the last tensor says is put in


def _read_and_written(packet: Any, inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """Tensors as large as what an operation reads and writes."""
    if packet in PICKING:  # it reads as much of its source as it gives
        return [*outputs, *outputs, *(t for t in inputs[1:] if not t.is_floating_point())]
    if packet in PLACING:  # it changes as much of its target as it is given, and reads that before if it adds
        return [*inputs[1:], *PLACING[packet] * inputs[-1:]]
    return [*inputs, *outputs]


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: a broadcast dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= 1 if stride == 0 and size > 0 else size
    return elements * tensor.element_size()
