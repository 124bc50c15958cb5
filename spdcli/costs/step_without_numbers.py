"""A step without numbers: the engine's own step on tensors that have shapes and no storage.

Floating-point tensors live on torch's `meta` device; whole numbers and truths (tokens, rows, positions) are real,
because shapes depend on them. So every size of model is stepped through in a moment, by the code that will do the
work, and what it would cost is counted: operations, bytes, and the most memory alive at once.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from spdcli.costs.heap import Heap
from spdcli.costs.tally import Tally
from spdcli.engine.masks import Noise
from spdcli.engine.variants import Piece

META, CPU = torch.device("meta"), torch.device("cpu")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_")
NEW_WHOLE = {"aten::new_zeros": torch.zeros, "aten::new_ones": torch.ones, "aten::new_empty": torch.empty}


class NoNoise(Noise):
    """Random numbers that are shapes alone."""

    def __init__(self) -> None:
        super().__init__(torch.Generator())

    def __call__(self, out: Tensor, piece: Piece, name: str, kind: str) -> None:
        out.uniform_()


class _ProcessorsAttention(TorchFunctionMode):
    """On the meta device torch writes attention out; this is the kernel that a processor would take."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None and len(args) == 3:
            q, k, v = args
            if q.is_meta and q.shape[:-2] == k.shape[:-2]:
                causal, scale = kwargs.get("is_causal", False), kwargs.get("scale")
                kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                return kernel(q, k, v, 0.0, causal, scale=scale)[0]
        return function(*args, **kwargs)


class Dry(Tally):
    """A Tally that counts what code costs without running it: floating-point tensors have a shape and no numbers.

    They lie on torch's meta device. Integer and boolean tensors keep their numbers, for code indexes and branches on
    them, and are made on the CPU even where code names the meta device. An operation on tensors of both kinds is done
    on their shapes alone. `.item()` of a tensor without numbers is 1.
    """

    def __init__(self, heap: Heap | None = None) -> None:
        super().__init__(heap)
        self._attention = _ProcessorsAttention()

    def __enter__(self) -> Self:
        super().__enter__()
        self._attention.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._attention.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function.name().startswith("aten::_local_scalar_dense") and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        function, args, kwargs = _without_storage(function, args, kwargs)
        out = function(*args, **kwargs)
        self.note(function, args, kwargs, out)
        return out


def _without_storage(function: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The operation as it can be done on shapes."""
    name = function.name().partition(".")[0]
    if _makes_whole_numbers(name, args, kwargs):
        if name in NEW_WHOLE:
            return NEW_WHOLE[name], args[1:2], {"dtype": kwargs["dtype"]}
        return function, args, kwargs | {"device": CPU}
    if name in INDEXED:
        args = (args[0], [number for index in args[1] for number in _by_number(index)], *args[2:])
    if any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves((args, kwargs))):
        return function, *tree_map(_shape_alone, (args, kwargs))
    return function, args, kwargs


def _makes_whole_numbers(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this would put whole numbers or truths onto the meta device."""
    dtype = kwargs.get("dtype")
    if name in NEW_WHOLE:
        return dtype is not None and not dtype.is_floating_point and args[0].is_meta
    if kwargs.get("device") != META:
        return False
    if name == "aten::_to_copy":
        return not args[0].is_meta and not args[0].is_floating_point()
    if name == "aten::arange" and dtype is None:
        return not any(isinstance(bound, float) for bound in args)
    return dtype is not None and not dtype.is_floating_point


def _by_number(index: Tensor | None) -> list[Tensor | None]:
    """An index by truths as one by numbers, an index a dimension: its shape is known before anything is looked up."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return list(index.nonzero().unbind(1))


def _shape_alone(value: Any) -> Any:
    return value.to(META) if isinstance(value, Tensor) and not value.is_meta else value
