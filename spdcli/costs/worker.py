"""One case of a benchmark in a process of its own: honest peaks of memory, and steps on demand.

The process builds the case and sends how many bytes it used before; then it answers requests on a pipe: `step` with
the seconds of one step, `count` with a Count of one, `peak` with the most bytes that it has had at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from spdcli.costs.groups import Case

STEP, COUNT, PEAK = "step", "count", "peak"


@dataclass(frozen=True)
class Count:
    """One step: its seconds, the floating-point operations of its products, the bytes that its operations read and
    write, and how many operations they are."""

    seconds: float
    flops: int
    bytes: int
    operations: int


@dataclass(frozen=True)
class Failure:
    """What the process says, last of all, when something went wrong in it."""

    reason: str


def serve(connection: Connection, case: Case, device: str, threads: int | None) -> None:
    """The process's life: it builds `case`, answers requests and ends with the pipe, or with a Failure."""
    try:
        built = BuiltCase(case, device, threads)
        connection.send(built.base)
        while True:
            connection.send(built.answer(connection.recv()))
    except (EOFError, BrokenPipeError):  # the other end is gone
        pass
    except Exception as error:  # the other end knows what to do with it
        connection.send(Failure(f"{type(error).__name__}: {error}"))


class BuiltCase:
    """A case that is ready to make steps: `base` bytes were in use before it was built."""

    def __init__(self, case: Case, device: str, threads: int | None) -> None:
        import torch

        from spdcli.machine import keep_freed_memory, used_bytes

        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device(device)
        if case.keep_freed:
            keep_freed_memory()
        self.base = used_bytes(self.device)
        self.step = step_of(case, self.device)

    def answer(self, request: str) -> float | int | Count:
        """Seconds for `step`, a Count for `count`, bytes for `peak`."""
        from spdcli.costs.tally import Tally
        from spdcli.machine import peak_bytes

        if request == PEAK:
            return peak_bytes(self.device)
        if request == STEP:
            return self._seconds()
        with Tally() as tally:
            seconds = self._seconds()
        return Count(seconds, tally.flops, tally.bytes, tally.operations)

    def _seconds(self) -> float:
        from spdcli.machine import synchronise

        synchronise(self.device)
        begun = time.perf_counter()
        self.step()
        synchronise(self.device)
        return time.perf_counter() - begun


def step_of(case: Case, device: Any) -> Callable[[], object]:
    """A function that makes one step of the case, optimizer included."""
    from spdcli.costs.random_targets import random_subject
    from spdcli.machine import product_inputs
    from spdcli.recipe.reading import load_recipe, select_matrices
    from spdcli.runs.decomposition import start_decomposition
    from spdcli.runs.settings import fit_settings, optimiser_settings

    if case.way == "product":
        a, b = product_inputs(device)
        return lambda: a @ b
    loaded = load_recipe(case.recipe, case.settings)
    recipe = loaded.recipe
    subject = random_subject(recipe, device, case.prompts)
    decomposition = start_decomposition(recipe, subject, select_matrices(loaded, list(subject.target.matrices)))
    from spdcli.engine.fit import fit, start_fit

    schedule = optimiser_settings(recipe.decompose)
    state = start_fit(decomposition, schedule, recipe.seed, device, recipe.decompose.slice_rate)
    settings = replace(fit_settings(recipe), prune_step=None, log_every=recipe.decompose.steps)
    if case.way == "plan":
        steps = fit(subject.target, decomposition, subject.batches, state, settings)
        return lambda: next(steps)
    from spdcli.costs.one_by_one import fit_one_by_one, whole_gates

    gates = whole_gates if case.way == "plain" else nullcontext
    slow = fit_one_by_one(subject.target, decomposition, subject.batches, state, settings)

    def step() -> object:
        with gates():
            return next(slow)

    return step
