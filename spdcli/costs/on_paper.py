"""One of several processes whose others are not there: what each would compute, hold and send."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spdcli.engine.portion import Portion
from spdcli.engine.processes import Processes


@dataclass(frozen=True)
class Divided:
    """How a step is divided between `processes`: `by` sequences or rows of the plan; the most `sequences`, and the most
    `rows`, that one of them works out; and the bytes that each sends to the others in a step."""

    processes: int
    by: str
    sequences: int
    rows: int
    sent_per_step: int


@dataclass(frozen=True)
class OnPaper(Processes):
    """The first of `count` processes, which has most to do. It speaks to nobody, and notes how many bytes it would have
    summed."""

    summed: list[int] = field(default_factory=list)

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """As if every one of `parameters` had a gradient in one of them."""
        for parameter in parameters if self.count > 1 else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._sum(parameter.grad)

    @property
    def sent(self) -> int:
        """Bytes that each process sends where sums go round in a ring: all but its own part, twice."""
        return round(2 * (self.count - 1) / self.count * sum(self.summed))

    def _sum(self, tensor: Tensor) -> None:
        self.summed.append(tensor.numel() * tensor.element_size())


def divided(portion: Portion, variants: int, processes: OnPaper) -> Divided | None:
    """How a step of so many `variants` is divided; None where there is one process."""
    count, sequences = processes.count, len(portion.whole.tokens)
    if count == 1:
        return None
    start, stop = portion.sequences
    rows = math.ceil(variants * sequences / count) if portion.by_rows else variants * (stop - start)
    return Divided(count, "rows" if portion.by_rows else "sequences", stop - start, rows, processes.sent)
