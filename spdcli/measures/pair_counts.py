"""How often pairs occur, in memory that does not grow with the text: exact as long as there is room for all pairs."""

from __future__ import annotations

import numpy as np


class PairCounts:
    """Counts of `keys`, of which at most `room` are kept (lossy counting).

    Where there are more the rarest are dropped, and no count is short by more than `missed`.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.keys = np.empty(0, dtype=np.int64)
        self.counts = np.empty(0, dtype=np.int64)
        self.missed = 0
        self._waiting: list[np.ndarray] = []

    def add(self, keys: np.ndarray) -> None:
        """Count every element of `keys` `[n]` once."""
        self._waiting.append(keys)
        if sum(map(len, self._waiting)) >= self.room:
            self.settle()

    def settle(self) -> None:
        """Bring `keys`, in ascending order, and `counts` up to date."""
        if not self._waiting:
            return
        new, own = np.unique(np.concatenate(self._waiting), return_counts=True)
        self._waiting = []
        self.keys, places = np.unique(np.concatenate([self.keys, new]), return_inverse=True)
        counts = np.zeros(len(self.keys), dtype=np.int64)
        np.add.at(counts, places, np.concatenate([self.counts, own]))
        self.counts = counts
        if len(self.keys) > self.room:
            least = int(np.partition(self.counts, len(self.counts) - self.room - 1)[len(self.counts) - self.room - 1])
            kept = self.counts > least
            self.keys, self.counts, self.missed = self.keys[kept], self.counts[kept], self.missed + least
