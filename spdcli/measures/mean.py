"""A mean and its standard error over sequences, from batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Mean:
    """A mean over all positions that sequences have, and its standard error over sequences, fed in batches.

    A sequence's own mean counts as often as it has positions, as it does in a training step; where all have as many, or
    none are told, it is the mean over sequences. `weight` is the number of positions so far, and the other sums are of
    weight, value and their products: w v, w² v², w² v and w².
    """

    count: int = 0
    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    products: float = 0.0
    weights: float = 0.0

    def add(self, values: Tensor, positions: Tensor | None = None) -> None:
        """One value a sequence, `[B]`, and how many positions it is the mean of, `[B]`."""
        wide = values.double()
        weight = wide.new_ones(len(wide)) if positions is None else positions.double()
        self.count += values.numel()
        self.weight += weight.sum().item()
        self.total += (weight * wide).sum().item()
        self.squares += (weight * wide).square().sum().item()
        self.products += (weight.square() * wide).sum().item()
        self.weights += weight.square().sum().item()

    def join(self, other: Mean) -> None:
        """All values of another such mean."""
        self.count += other.count
        self.weight += other.weight
        self.total += other.total
        self.squares += other.squares
        self.products += other.products
        self.weights += other.weights

    @property
    def value(self) -> float:
        """The mean of all values so far."""
        return self.total / self.weight

    @property
    def error(self) -> float:
        """Standard error of the mean, sqrt(n / (n - 1) sum of w² (v - mean)²) / sum of w of n sequences; NaN for fewer
        than two."""
        if self.count < 2:
            return math.nan
        spread = self.squares - 2 * self.value * self.products + self.value**2 * self.weights
        return math.sqrt(max(0.0, spread) * self.count / (self.count - 1)) / self.weight
