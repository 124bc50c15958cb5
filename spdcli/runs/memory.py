"""A run that lies nowhere: what training needs of a run directory, kept in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from spdcli.engine.fit import FitState
from spdcli.progress import Report, silent


class MemoryRun:
    """Metrics in a list, and no file: what is interrupted is lost."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []

    @property
    def has_checkpoint(self) -> bool:
        return False

    def start_metrics(self, after: int = 0) -> None:
        """Keep the records up to step `after`."""
        self._records = [record for record in self._records if record["step"] <= after]

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        self._records.append(dict(record))

    def metrics(self) -> list[dict[str, Any]]:
        return list(self._records)

    def save_checkpoint(self, module: nn.Module, state: FitState) -> None:
        """Nothing, likewise."""

    def load_checkpoint(self, module: nn.Module, state: FitState, report: Report = silent) -> None:
        """Nothing: there is none."""

    def keep_step(self, module: nn.Module, state: FitState, step: int) -> None:
        """Nothing, likewise."""

    def step_back(self) -> bool:
        """False: there is no checkpoint before."""
        return False

    def save(self, decomposition: nn.Module, state: FitState) -> None:
        """Nothing: the caller holds the decomposition."""

    def __str__(self) -> str:
        return "memory"
