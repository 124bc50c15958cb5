"""A mean over sequences and its standard error, from batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Mean:
    """A mean over sequences and its standard error, fed in batches."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """One value a sequence."""
        wide = values.double()
        self.count += values.numel()
        self.total += wide.sum().item()
        self.squares += wide.square().sum().item()

    def join(self, other: Mean) -> None:
        """All values of another one too."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    @property
    def value(self) -> float:
        """The mean of all values so far."""
        return self.total / self.count

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN for fewer than two sequences."""
        if self.count < 2:
            return math.nan
        spread = max(0.0, self.squares / self.count - self.value**2)
        return math.sqrt(spread / (self.count - 1))
