"""One case of a benchmark in a process of its own: honest peaks of memory, and steps on demand.

The process builds the case, then answers on a pipe: `step` with the seconds of one step, `peak` with the most
memory it has had, `count` with what a step costs in operations and bytes besides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

WAYS = ("plan", "one by one", "plain", "product")


@dataclass(frozen=True)
class Case:
    """What one process measures.

    `recipe` with `settings` (as `--set` takes them) says what is decomposed, with random weights; `way` how a step is
    made: by the engine (plan), every variant by itself (one by one), the same with the gate network made whole
    (plain), or, in place of a step, one square matrix product (product). `keep_freed` is the allocator's switch.
    `large` says that it may need more memory than there is: that is found out, without numbers, before it is started.
    """

    name: str
    recipe: str
    settings: tuple[str, ...] = ()
    way: str = "plan"
    keep_freed: bool = True
    large: bool = False
    prompts: tuple[int, int] = (2, 9)
    labels: dict[str, Any] = field(default_factory=dict)


def serve(connection: Connection, case: Case, device: str, threads: int | None) -> None:
    """The process's life. Every answer is a dict; `error` in it ends the process."""
    try:
        answers = Answers(case, device, threads)
        connection.send({"ready": answers.base})
        while (asked := connection.recv()) != "end":
            connection.send(answers.of(asked))
    except (EOFError, BrokenPipeError):  # whoever asked is gone
        pass
    except Exception as error:  # told to the process that asked, which knows what to do with it
        connection.send({"error": f"{type(error).__name__}: {error}"})


class Answers:
    """A case that has been built: `base` bytes were in use before that."""

    def __init__(self, case: Case, device: str, threads: int | None) -> None:
        import torch

        from spdcli.machine import keep_freed_memory, used_bytes

        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device(device)
        if case.keep_freed:
            keep_freed_memory()
        self.case = case
        self.base = used_bytes(self.device)
        self.step = build(case, self.device)

    def of(self, asked: str) -> dict[str, float]:
        """The answer to `step`, `peak` or `count`."""
        from spdcli.costs.tally import Tally
        from spdcli.machine import peak_bytes, synchronise

        if asked == "peak":
            return {"peak_bytes": peak_bytes(self.device)}
        tally = Tally() if asked == "count" else None
        synchronise(self.device)
        begun = time.perf_counter()
        with tally or nullcontext():
            self.step()
        synchronise(self.device)
        seconds = {"seconds": time.perf_counter() - begun}
        if tally is None:
            return seconds
        return seconds | {"flops": tally.flops, "bytes": tally.bytes, "operations": tally.operations}


def build(case: Case, device: Any) -> Callable[[], object]:
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
