"""The watchdog of a training: what is told before the first step, and what becomes of the alarms."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor

from spdcli.engine.all_off import losses_all_off
from spdcli.engine.fit import FitSettings, Record
from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Target
from spdcli.errors import Collapsed, SpdError
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.schema import Recipe
from spdcli.runs.contents import is_whole_record
from spdcli.runs.subject import Subject
from spdcli.runs.watchdog import SIGNS, Alarm, Watchdog, Watched

REWINDS = 5  # then the learning rate is a 32nd of the recipe's, and something else is wrong
ROWS = 256  # positions at most by which it is told how many slices the data need
LEFT_OUT = 0.05  # share of what a matrix writes that the best slices may leave out
FEW_PROMPTS = 0.1  # share of the prompts that a batch should be larger than


class Guard:
    """Hands a run's records to its watchdog, reports the alarms, and says what becomes of a collapse.

    `on_collapse` is a key of `recipe.choices.COLLAPSES`; `before` are alarms of before the first step, which go into
    the log with its record. `rewinds` counts how often training went back.
    """

    def __init__(self, run: Watched, on_collapse: str, report: Report = silent, before: list[Alarm] | None = None):
        self.on_collapse = on_collapse
        self.report = report
        self.rewinds = 0
        self._before = before or []
        self._watchdog = Watchdog(run)
        self._collapse: Alarm | None = None

    def replay(self, records: list[dict[str, Any]]) -> None:
        """Let the watchdog see the log of what was trained before, whose alarms were told and logged then."""
        self._before = [] if records else self._before
        names = {one.name for one in fields(Record)}
        needed = {one.name for one in fields(Record) if one.default is MISSING and one.default_factory is MISSING}
        for record in records:
            if is_whole_record(record) and record.keys() >= needed:
                known = {name: value for name, value in record.items() if name in names}
                self._watchdog.see(Record(**known))

    def see(self, record: Record) -> list[Alarm]:
        """What there is to tell at this record."""
        alarms = self._watchdog.see(record)
        acted_on = [alarm for alarm in alarms if alarm.collapse and self.on_collapse != "warn"]
        self._collapse = next(iter(acted_on), None)
        for alarm in alarms:
            if alarm not in acted_on:  # what is acted on is told then
                self.report(Progress(str(alarm), warning=True))
        raised, self._before = [*self._before, *alarms], []
        return raised

    @property
    def collapse(self) -> Collapsed | None:
        """The collapse that the newest record shows and that is not only to be warned of."""
        if self._collapse is None:
            return None
        hint = f"{self._collapse.setting}; or --resume --set decompose.on_collapse=warn goes on all the same"
        return Collapsed(f"step {self._collapse.step}: {self._collapse.text}", hint, self._collapse.step)

    @property
    def may_save(self) -> bool:
        """Whether a checkpoint may be written: not one that training could go back to in vain."""
        return self.on_collapse != "rewind" or self._watchdog.well

    def may_rewind(self, step: int) -> bool:
        """Whether training may go back from a collapse, or a loss that is not finite, at `step`."""
        mended = step > 1 or (self._collapse is not None and SIGNS[self._collapse.kind].of_the_rate)
        return self.on_collapse == "rewind" and self.rewinds < REWINDS and mended

    def rewind(self, error: SpdError, step: int) -> None:
        """Tell that training goes back to `step`, and watch from there."""
        self.rewinds += 1
        self._watchdog = self._watchdog.anew()
        self.report(Progress(f"{error}: going back to step {step}, with half the learning rate", warning=True))


def start_guard(
    recipe: Recipe, subject: Subject, decomposition: Decomposition, settings: FitSettings, report: Report = silent
) -> Guard:
    """The guard of a run that is about to train, and to `report`.

    One batch is drawn for it, from a generator of its own: what the losses are with every slice off is worked out on
    it, once.
    """
    batch = subject.batches(torch.Generator().manual_seed(recipe.seed + 1), 0)
    clean = clean_pass(subject.target, batch, decomposition.names, outputs=settings.losses.compares_outputs)
    run = Watched(
        steps=settings.steps,
        all_off=losses_all_off(subject.target, decomposition, clean, settings.losses, settings.plan_bytes),
        slices=recipe.slices.C * len(decomposition.names),
        blocks={name: subject.target.matrices[name].block for name in decomposition.names},
        gate_bias=recipe.importance.gate_bias,
        prune_step=settings.prune_step,
        clipped=settings.clip_gates is not None,
        size=root_mean_square(decomposition.slices.parameters()),
        slice_rate=recipe.decompose.slice_rate,
    )
    before = forewarnings(recipe, subject.target, decomposition.names, clean)
    for alarm in before:
        report(Progress(str(alarm), warning=True))
    return Guard(run, recipe.decompose.on_collapse, report, before)


@torch.no_grad()
def root_mean_square(tensors: Iterable[Tensor]) -> float:
    """That of all numbers of several tensors."""
    squares = [(tensor.double().square().sum().item(), tensor.numel()) for tensor in tensors]
    return math.sqrt(sum(square for square, _ in squares) / sum(count for _, count in squares))


def forewarnings(recipe: Recipe, target: Target, names: list[str], clean: Clean) -> list[Alarm]:
    """What a recipe will suffer from, by its first batch: too few slices, and batches of few of many prompts."""
    alarms = []
    short = shortfalls(target, names, clean, recipe.slices.C)
    if short:
        name, left = max(short.items(), key=lambda item: item[1])
        text = (
            f"slices.C = {recipe.slices.C} is below the span of the data in {len(short)} matrices: of what {name} "
            f"writes, the best slices leave {left:.1%} out"
        )
        alarms.append(Alarm("few_slices", 0, left, text, "raise slices.C", collapse=False))
    prompts = 0 if recipe.data is None else len(recipe.data.prompts or ())
    size = recipe.decompose.batch
    if 0 < size <= FEW_PROMPTS * prompts and recipe.importance.start == "random":  # else no gate has all to learn
        text = f"a batch has {size} of {prompts} prompts: gates meet each of them once in {prompts / size:.0f} steps"
        alarms.append(Alarm("small_batch", 0, size / prompts, text, "raise decompose.batch", collapse=False))
    return alarms


@torch.no_grad()
def shortfalls(target: Target, names: list[str], clean: Clean, slices: int) -> dict[str, float]:
    """Where no `slices` can be enough: the share of the energy of x W, over real positions x of the batch, that the
    best rank-1 pieces in that number leave out, by matrix. Only of those that leave more than LEFT_OUT.

    Measured on ROWS positions at most, which need the fewer slices.
    """
    short = {}
    for name in names:
        x, weight = clean.inputs[name][clean.batch.valid][:ROWS], target.matrices[name].weight
        if slices >= min(len(x), *weight.shape):
            continue
        written = (x.float() @ weight.float()).double()
        gram = written @ written.t() if len(written) <= written.shape[1] else written.t() @ written
        energies = torch.linalg.eigvalsh(gram).clamp(min=0)  # ascending
        left = (energies[: len(energies) - slices].sum() / energies.sum().clamp(min=1e-30)).item()
        if left > LEFT_OUT:
            short[name] = left
    return short
