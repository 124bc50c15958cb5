"""TensorBoard's event files beside a run's metrics.jsonl: the same records, for who watches runs there."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from spdcli.engine.fit import Record
from spdcli.errors import UsageError
from spdcli.runs.directory import EVENTS, RunDirectory
from spdcli.runs.following import FollowedRun
from spdcli.runs.memory import MemoryRun

Log = Callable[[Record], object]


def require_tensorboard(wanted: bool, store: RunDirectory | FollowedRun | MemoryRun) -> None:
    """UsageError where events are `wanted` and cannot be written."""
    if wanted and isinstance(store, MemoryRun):
        raise UsageError("decompose.tensorboard is about a run directory", "give out=, or leave it off")
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("decompose.tensorboard: TensorBoard is not installed", "pip install 'spd-cli[tensorboard]'")


@contextmanager
def event_log(store: RunDirectory | FollowedRun | MemoryRun, wanted: bool, after: int) -> Iterator[Log]:
    """While open, what writes a record into the run's event files; it does nothing unless events are `wanted`.

    Of a run that goes on, what earlier files say of the steps beyond `after` counts no more.
    """
    require_tensorboard(wanted, store)
    if not wanted or not isinstance(store, RunDirectory):
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(store / EVENTS), purge_step=after + 1) as writer:

        def log(record: Record) -> None:
            for tag, value in scalars(asdict(record)).items():
                writer.add_scalar(tag, value, record.step)
            writer.flush()

        yield log


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record but for its step, by their place; what is none, or not finite, is left out.

    >>> scalars({"step": 5, "total": 0.5, "losses": {"recon": 0.25}, "p": None})
    {'total': 0.5, 'losses/recon': 0.25}
    """
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value) and key != "step":
            flat[prefix + key] = float(value)
    return flat
