"""A process that was started as one of several finds the others: those of `--nproc`, or of `torchrun`.

Whoever starts processes tells each of them, in its environment, which one it is and where all of them meet.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed

from spdcli.engine.processes import ALONE, Processes
from spdcli.errors import Collapsed, Interrupted, LostProcess, NotFinite, UsageError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a process has to be told
SILENCE = timedelta(minutes=30)  # after which the others count as gone; a step, or a save, takes no longer
PREPARED = "prepared"
POLL = 0.2  # seconds
Made = TypeVar("Made")
SAID_BY_THE_FIRST = (Collapsed, Interrupted, LostProcess, NotFinite, UsageError)  # which all of them come to
_meetings = count()


def started_with_others() -> bool:
    """Whether this process was started as one of several."""
    return all(os.environ.get(name) for name in MEETING) and int(os.environ["WORLD_SIZE"]) > 1


def follows_another() -> bool:
    """Whether another process of the run is the first, which writes and tells."""
    return started_with_others() and int(os.environ["RANK"]) > 0


@dataclass(frozen=True)
class Meeting:
    """The `processes` that have met, and the `store` that they leave each other word in; None for one alone."""

    processes: Processes
    store: Store | None = None

    def first_then_others(self, make: Callable[[], Made]) -> Made:
        """What `make` gives; the first process makes it before the others begin, however long that takes: what it
        trained, read or tokenised is there then."""
        if self.store is not None and self.processes.rank:
            while not self.store.check([PREPARED]):
                time.sleep(POLL)
        made = make()
        if self.store is not None and not self.processes.rank:
            self.store.set(PREPARED, "")
        return made


@contextmanager
def met(device: str) -> Iterator[Meeting]:
    """While open, this process and those that it was started with are connected: by gloo, and for what lies on a GPU by
    NCCL. `device` is a recipe's: auto, cpu or cuda; each process has the GPU of its local number.

    A process group that the program has set up already is used, and stays.
    """
    if distributed.is_available() and distributed.is_initialized():
        yield Meeting(Processes(distributed.get_rank(), distributed.get_world_size()))
        return
    if not started_with_others():
        yield Meeting(ALONE)
        return
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not in its stubs

    backend = "gloo"
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        require_gpus(local_number() + 1)
        torch.cuda.set_device(local_number())
        backend = "cpu:gloo,cuda:nccl"
    place, rank, world = _meeting_place()
    store = PrefixStore(f"spd/{next(_meetings)}", place)  # a program may make several runs
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=SILENCE)
    try:
        yield Meeting(Processes(rank, world), store)
    finally:
        distributed.destroy_process_group()


@cache
def _meeting_place() -> tuple[Store, int, int]:
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=SILENCE))


def local_number() -> int:
    """The number of this process among those on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))


def started_counts() -> tuple[int, int]:
    """How many processes were started together, and how many of them on this machine."""
    if not started_with_others():
        return 1, 1
    return int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def require_gpus(processes: int) -> None:
    """UsageError where this machine has fewer GPUs, a process each."""
    there = torch.cuda.device_count()
    if there < processes:
        raise UsageError(
            f"{processes} processes need a GPU each, and this machine has {there}", "--device cpu, or fewer"
        )
