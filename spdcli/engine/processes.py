"""The processes that make the steps of one run together, and the few things that they tell each other.

They all draw the same random numbers and hold the same parameters; each works out a portion of every step (see
`portion.Portion`). What it adds to a loss or a gradient is summed over all of them, so that a step is that of one
process but for rounding. They speak through torch.distributed, which whoever starts them has set up (`runs.joining`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.errors import LostProcess

BUNCH = 1 << 26  # bytes that are copied into one message; what is larger by itself is a message


@dataclass(frozen=True)
class Processes:
    """This process is number `rank`, from 0, of `count`. Every method is called by all of them, in the same order."""

    rank: int = 0
    count: int = 1

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Make each of `tensors` the sum of what it is in every process, in place."""
        if self.count == 1:
            return
        for bunch in _bunches(tensors):
            if len(bunch) == 1 and bunch[0].is_contiguous():
                self._sum(bunch[0])
                continue
            flat = torch.cat([tensor.flatten() for tensor in bunch])
            self._sum(flat)
            for tensor, part in zip(bunch, flat.split([tensor.numel() for tensor in bunch]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Make the gradient of each of `parameters` the sum of those in every process; what has none in any of them
        keeps none."""
        if self.count == 1:
            return
        parameters = list(parameters)
        having = self.numbers([float(parameter.grad is not None) for parameter in parameters])
        reached = [parameter for parameter, count in zip(parameters, having, strict=True) if count]
        for parameter in reached:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.add_up([parameter.grad for parameter in reached if parameter.grad is not None])

    def numbers(self, own: Sequence[float]) -> list[float]:
        """The sums over all processes of `own` numbers, on the host: no device is waited for."""
        sums = torch.tensor(own, dtype=torch.float64)
        if self.count > 1:
            self._sum(sums)
        return sums.tolist()

    def any(self, own: bool) -> bool:
        """Whether it is so in one of them."""
        return own if self.count == 1 else self.numbers([float(own)])[0] > 0

    def least(self, own: float) -> float:
        """The smallest of the processes' numbers."""
        return min(self.numbers([own if rank == self.rank else 0.0 for rank in range(self.count)]))

    def follow(self, tensors: Iterable[Tensor], rank: int = 0) -> None:
        """Make each of `tensors` what it is in process `rank`, in place."""
        if self.count > 1:
            for tensor in tensors:
                self._send(tensor, rank)

    def _sum(self, tensor: Tensor) -> None:
        with _heard():
            torch.distributed.all_reduce(tensor)

    def _send(self, tensor: Tensor, rank: int) -> None:
        with _heard():
            torch.distributed.broadcast(tensor, src=rank)


ALONE = Processes()


@contextmanager
def _heard() -> Iterator[None]:
    """Within it, that another process does not answer is a LostProcess."""
    try:
        yield
    except RuntimeError as error:  # gloo has no other
        raise LostProcess(
            "another process of the run has ended, or does not answer", str(error).split("\n")[0]
        ) from error


def _bunches(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in lists of one type and device, of BUNCH bytes each or a single tensor."""
    bunch: list[Tensor] = []
    size = 0
    for tensor in sorted(tensors, key=lambda tensor: (str(tensor.dtype), str(tensor.device))):
        bytes_ = tensor.numel() * tensor.element_size()
        alike = bunch and (tensor.dtype, tensor.device) == (bunch[0].dtype, bunch[0].device)
        if bunch and (not alike or size + bytes_ > BUNCH):
            yield bunch
            bunch, size = [], 0
        bunch.append(tensor)
        size += bytes_
    if bunch:
        yield bunch
