"""A run directory as every process but the first has it: read, and never written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from spdcli.engine.fit import FitState
from spdcli.progress import Report, silent
from spdcli.runs.directory import RunDirectory


class FollowedRun:
    """What training needs of the `run` that the first process writes."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._newest: int | None = None  # the step of the newest checkpoint, as the first process knows it

    @property
    def has_checkpoint(self) -> bool:
        return self.run.has_checkpoint

    def metrics(self) -> list[dict[str, Any]]:
        return self.run.metrics()

    def load_checkpoint(self, module: nn.Module, state: FitState, report: Report = silent) -> None:
        self.run.load_checkpoint(module, state, report)
        self._newest = state.step

    def step_back(self) -> bool:
        return self.run.step_back()

    def start_metrics(self, after: int = 0) -> None:
        """Nothing: the first process does, here and in what follows."""

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        """Nothing, likewise."""

    def save(self, decomposition: nn.Module, state: FitState) -> None:
        """The first process saves; what this one alone has of the moments goes there."""
        state.moments()
        self._newest = state.step

    def keep_step(self, module: nn.Module, state: FitState, step: int) -> None:
        """As `save`, where the first process does."""
        if step not in (0, self._newest):
            state.moments()

    def __str__(self) -> str:
        return str(self.run)
