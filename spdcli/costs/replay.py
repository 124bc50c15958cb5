"""How long a step would take here: the operations of a dry run, tried on this machine, each kind for a moment."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from spdcli.costs.machine import synchronise

SECONDS = 8.0  # for trying operations, all kinds together
FLOPS_RATE, BYTES_RATE = 3e10, 6e9  # a first guess, by which kinds are ordered: the largest share is tried first
TRIES = 3
SMALL = 1000  # operations on next to nothing
OPTIMISED = 1 << 22  # parameters that an optimizer's step is tried on


@dataclass(frozen=True)
class Shape:
    """What is needed to make a tensor like one of the dry run."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device) -> Tensor:
        """A tensor of this shape: random, or zeros for whole numbers, which are then valid as indices."""
        extent = (
            1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True)) if 0 not in self.size else 0
        )
        if self.dtype.is_floating_point:
            return torch.rand(extent, dtype=self.dtype, device=device).as_strided(self.size, self.stride)
        return torch.zeros(extent, dtype=self.dtype, device=device).as_strided(self.size, self.stride)


@dataclass
class Kind:
    """Operations of a step that are alike: function, shapes, other arguments; how many, and their guessed seconds."""

    function: Any
    args: Any
    kwargs: Any
    guess: float
    count: int = 0

    def tried(self, device: torch.device) -> float:
        """Seconds of one such operation on `device`, the best of a few."""
        fill = lambda value: value.make(device) if isinstance(value, Shape) else value  # noqa: E731
        args, kwargs = tree_map(fill, (self.args, self.kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = device
        best = float("inf")
        for number in range(TRIES):
            synchronise(device)
            begun = time.perf_counter()
            self.function(*args, **kwargs)
            synchronise(device)
            spent = time.perf_counter() - begun
            best = min(best, spent) if number else best  # the first one warms up
            if number and spent > 0.1:
                break
        return best


class Replay:
    """Collects the kinds of a dry run's operations (it is a `dry.Watch`), and estimates their seconds."""

    def __init__(self) -> None:
        self.kinds: dict[Any, Kind] = {}

    def __call__(self, function: Any, args: Any, kwargs: Any) -> None:
        args, kwargs = tree_map(_shape_of, (args, kwargs))
        key = (function, repr((args, kwargs)))
        if key not in self.kinds:
            self.kinds[key] = Kind(function, args, kwargs, _guess(args, kwargs))
        self.kinds[key].count += 1

    def seconds(self, device: torch.device, limit: float = SECONDS) -> float:
        """Estimated seconds of all operations, one after the other, with what Python and autograd add to each.

        Kinds are tried from the largest guessed share on until `limit` seconds are spent; the rest count by their
        guess, corrected by what trying the others has shown.
        """
        until = time.perf_counter() + limit
        known = guessed = left = 0.0
        for kind in sorted(self.kinds.values(), key=lambda kind: -kind.guess * kind.count):
            if time.perf_counter() > until:
                left += kind.guess * kind.count
                continue
            try:
                with torch.no_grad():
                    known += kind.tried(device) * kind.count
                guessed += kind.guess * kind.count
            except (RuntimeError, TypeError, IndexError):  # it wants values that shapes do not tell
                left += kind.guess * kind.count
        around = operation_seconds(device) * sum(kind.count for kind in self.kinds.values())
        return around + known + (left * known / guessed if guessed else left)


def _shape_of(value: Any) -> Any:
    return Shape(tuple(value.shape), tuple(value.stride()), value.dtype) if isinstance(value, Tensor) else value


def _guess(args: Any, kwargs: Any) -> float:
    """A rough number of seconds: 2 µs, the bytes, and for products their operations."""
    shapes = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Shape)]
    moved = sum(4 * _elements(shape) for shape in shapes)
    matrices = [shape for shape in shapes if len(shape.size) >= 2]
    products = 0
    if len(matrices) >= 2 and matrices[-2].size[-1] == matrices[-1].size[-2]:
        products = 2 * _elements(matrices[-2]) * matrices[-1].size[-1]
    return 2e-6 + moved / BYTES_RATE + products / FLOPS_RATE


def _elements(shape: Shape) -> int:
    product = 1
    for size, step in zip(shape.size, shape.stride, strict=True):
        product *= size if step else 1
    return product


def operation_seconds(device: torch.device) -> float:
    """Seconds that an operation takes on next to nothing, its backward counted as another: what surrounds the work."""
    best = float("inf")
    for _ in range(TRIES):
        x = torch.ones(1, device=device, requires_grad=True)
        begun = time.perf_counter()
        y = x
        for _ in range(SMALL):
            y = y * 1.0
        y.backward()
        synchronise(device)
        best = min(best, (time.perf_counter() - begun) / (2 * SMALL))
    return best


def optimiser_seconds(parameters: int, device: torch.device, dtype: torch.dtype) -> float:
    """Estimated seconds of an optimizer's step with clipping, tried on a few million parameters."""
    from spdcli.engine.optimise import OptimiserSettings, make_optimiser

    count = min(parameters, OPTIMISED)
    weights = torch.nn.Parameter(torch.rand(count, dtype=dtype, device=device))
    weights.grad = torch.rand_like(weights)
    optimiser = make_optimiser([{"params": [weights]}], OptimiserSettings("adam", 1e-3, 0.0, "constant", 0, 1))
    best = float("inf")
    for _ in range(TRIES):
        synchronise(device)
        begun = time.perf_counter()
        torch.nn.utils.clip_grad_norm_([weights], 1.0, foreach=True)
        optimiser.step()
        synchronise(device)
        best = min(best, time.perf_counter() - begun)
    return best * parameters / count
