"""The training loop of a decomposition: Algorithm 3, again and again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from spdcli.engine.direct_losses import exact_faithfulness
from spdcli.engine.finite import FiniteWatch
from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.masks import Noise
from spdcli.engine.optimise import OptimiserSettings, make_optimiser, set_rate
from spdcli.engine.ownership import Ownership, divided
from spdcli.engine.portion import Portion
from spdcli.engine.processes import ALONE, Processes
from spdcli.engine.step import Step, backward_step
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Batch, Batches, Target

ON_STREAM = "stream_"  # before a loss's name: its value on broad text
PRUNE_BATCHES = 128  # what a slice's frequency is counted on


@dataclass
class Record:
    """One logged step.

    `losses` are before their coefficients, `total` is their weighted sum; `active[m]` is the mean number of active
    slices (L0) at a position of matrix m, `always_on[m]` the number of its slices that are active at every position of
    the step's batch; `gradients` are the norms, before clipping, of slices and gates; `rate` is
    the learning rate, `p` the power of minimality or `gamma` that of its smooth penalty (None: the other is in use),
    `seconds` those since the start.
    """

    step: int
    losses: dict[str, float]
    total: float
    active: dict[str, float]
    gradients: dict[str, float]
    rate: float
    p: float | None
    seconds: float
    gamma: float | None = None
    always_on: dict[str, int] = field(default_factory=dict)


@dataclass
class FitState:
    """Everything a run needs to go on exactly where it stopped; `adversary` is what a persistent one keeps, and
    `rate_share` multiplies every learning rate of the schedule. With an `ownership` the optimizer has the parameters
    of this process alone."""

    optimiser: torch.optim.Optimizer
    schedule: OptimiserSettings
    generators: dict[str, torch.Generator]
    adversary: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    rate_share: float = 1.0
    ownership: Ownership | None = None

    @property
    def groups(self) -> list[list[Tensor]]:
        """All trained parameters, by group."""
        return self.ownership.groups if self.ownership else [group["params"] for group in self.optimiser.param_groups]

    def moments(self) -> dict[int, dict[str, Tensor]]:
        """What the optimizer keeps of each parameter, by its number through all groups. Where several processes make
        the run, all call this together, and the first has the answer."""
        return self.ownership.moments(self.optimiser) if self.ownership else self.optimiser.state_dict()["state"]

    def load_moments(self, moments: dict[int, dict[str, Tensor]]) -> None:
        """Let the optimizer go on from what `moments` gave."""
        if self.ownership:
            own = enumerate(self.ownership.own_numbers)
            moments = {place: moments[number] for place, number in own if number in moments}
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})


@dataclass(frozen=True)
class FitSettings:
    """What the loop does: a recipe's [decompose] and [losses], but for the optimizer.

    `clip_slices` and `clip_gates` are the largest gradient norms (None: no limit). Every `log_every` steps there is a
    Record. `plan_bytes` is the memory of a plan's chunk. After `prune_step` steps (None: never), slices active in fewer
    than the share `prune_below` of sequences are switched off. `targeted` is what the losses on the broad stream count,
    times those on the prompts.
    """

    steps: int
    clip_slices: float | None = None
    clip_gates: float | None = None
    log_every: int = 50
    plan_bytes: float = 4 * 2**30
    prune_step: int | None = None
    prune_below: float = 0.01
    losses: LossSettings = field(default_factory=lambda: LossSettings({}))
    targeted: float = 0.0


def start_fit(
    decomposition: Decomposition,
    settings: OptimiserSettings,
    seed: int,
    device: torch.device,
    slice_rate: float = 1.0,
    processes: Processes | None = None,
) -> FitState:
    """Optimizer, schedule and generators at step 0; `slice_rate` multiplies the learning rate of U and V.

    Generators, seeded from `seed`: `data` and `plan` on the CPU, `noise` on the device. With `processes` each of them
    updates a part of the parameters.
    """
    trained = [p for p in decomposition.importances.parameters() if p.requires_grad]
    ownership = divided([list(decomposition.slices.parameters()), trained], processes) if processes else None
    slices, gates = ownership.own if ownership else (list(decomposition.slices.parameters()), trained)
    groups: list[dict] = [{"params": slices, "factor": slice_rate}, {"params": gates}]
    optimiser = make_optimiser(groups, settings)
    generators = {
        "data": torch.Generator().manual_seed(seed + 1),
        "plan": torch.Generator().manual_seed(seed + 2),
        "noise": torch.Generator(device).manual_seed(seed + 3),
    }
    return FitState(optimiser, settings, generators, ownership=ownership)


def warm_up_faithfulness(target: Target, decomposition: Decomposition, steps: int, rate: float = 1e-3) -> float:
    """So many `steps` of Adam on faithfulness alone, before the run; the faithfulness (Eq. 1) that is reached."""
    optimiser = torch.optim.Adam(decomposition.slices.parameters(), lr=rate)
    for _ in range(steps):
        optimiser.zero_grad(set_to_none=True)
        exact_faithfulness(target, decomposition).backward()
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    with torch.no_grad():
        return exact_faithfulness(target, decomposition).item()


def fit(
    target: Target,
    decomposition: Decomposition,
    batches: Batches,
    state: FitState,
    settings: FitSettings,
    stream: Batches | None = None,
    processes: Processes = ALONE,
    by_rows: bool = False,
) -> Iterator[Record | None]:
    """Train until `settings.steps`; yields after every step, a Record where one is due and None elsewhere.

    `batches(generator, step)` gives the next minibatch, tokens `[B, T]`; when it gives the same object again the clean
    pass is not repeated. `stream(generator, step)` gives broad text beside it, for a targeted decomposition. `state`
    and `decomposition` are changed in place, so that the loop may be left after any step and gone on with later.

    Where several `processes` make the run, all call this with the same arguments, and each does its portion of every
    step: of its sequences, or `by_rows` of the rows of its plan (see `portion.Portion`). They yield the same Records.

    Raises NotFinite, naming step and loss, when a loss or a gradient is not finite: at once on a processor, at the next
    record on a GPU, which is not waited for in between. The parameters are then those of the step before.
    """
    noise = Noise(state.generators["noise"])
    watch = FiniteWatch(state.optimiser, target.device)
    begun = time.monotonic() - state.seconds
    clean: Clean | None = None
    portion: Portion | None = None
    while state.step < settings.steps:
        batch = batches(state.generators["data"], state.step)
        if clean is None or portion is None or portion.whole is not batch:
            portion = Portion(batch, processes, by_rows)
            patterns, clean = settings.losses.coefficients.get("attention", 0) > 0, None
            clean = clean_pass(target, portion.batch, decomposition.names, patterns, settings.losses.compares_outputs)
        now = replace(settings, losses=settings.losses.at(state.step, settings.steps))
        annealed = now.losses.annealed(state.step, settings.steps)
        step = _backward(target, decomposition, clean, portion, now, state, noise, annealed, stream)
        due = (state.step + 1) % settings.log_every == 0 or state.step + 1 in (1, settings.steps)
        _add_up(processes, state.groups, step, due)
        norms = _clipped(state.groups, settings)
        watch.see(state.step + 1, step, norms)
        if due or target.device.type != "cuda":
            watch.check(step.losses)
        rate = set_rate(state.optimiser, state.schedule, state.step, state.rate_share)
        state.optimiser.step()
        if state.ownership:
            state.ownership.spread()
        state.step += 1
        if state.step == settings.prune_step:
            _prune(target, decomposition, batches, state, settings.prune_below)
        state.seconds = time.monotonic() - begun
        yield _record(state, step, norms, now, rate, annealed) if due else None


def _backward(
    target: Target,
    decomposition: Decomposition,
    clean: Clean,
    portion: Portion,
    settings: FitSettings,
    state: FitState,
    noise: Noise,
    annealed: float,
    stream: Batches | None,
) -> Step:
    """The gradients of a step, in place of those of the last, and its losses, with those on the broad `stream`."""
    for parameter in (parameter for group in state.groups for parameter in group):
        parameter.grad = None
    backward = partial(
        backward_step,
        annealed=annealed,
        generator=state.generators["plan"],
        noise=noise,
        budget=settings.plan_bytes,
        kept=state.adversary,
    )
    step = backward(target, decomposition, clean, settings.losses, portion=portion)
    if stream is not None and settings.targeted > 0:
        broad = stream(state.generators["data"], state.step)
        losses, beside = settings.losses.on_stream(settings.targeted), portion_of(broad, portion.processes)
        passed = clean_pass(target, beside.batch, decomposition.names, outputs=losses.compares_outputs)
        also = backward(target, decomposition, passed, losses, portion=beside)
        step.losses |= {f"{ON_STREAM}{name}": loss for name, loss in also.losses.items()}
    return step


def portion_of(broad: Batch, processes: Processes) -> Portion:
    """This process's portion of a step on broad text: by rows where there are fewer sequences than processes."""
    return Portion(broad, processes, by_rows=len(broad.tokens) < processes.count)


def _add_up(processes: Processes, groups: list[list[Tensor]], step: Step, counts: bool) -> None:
    """Make the losses of `step`, the gradients, and with `counts` those of active slices, what they are over all
    processes."""
    if processes.count == 1:
        return
    processes.add_gradients(parameter for group in groups for parameter in group)
    step.losses = {name: loss.double() for name, loss in step.losses.items()}
    processes.add_up([*step.losses.values(), *(step.counts.values() if counts else ())])


def _clipped(groups: list[list[Tensor]], settings: FitSettings) -> dict[str, Tensor]:
    """Clips the gradients of slices and gates, each by its own limit; the norms that they had, one number each."""
    limits = {"slices": settings.clip_slices, "gates": settings.clip_gates}
    return {
        name: torch.nn.utils.clip_grad_norm_(group, limit or math.inf, foreach=True)
        for (name, limit), group in zip(limits.items(), groups, strict=True)
    }


def _prune(target: Target, decomposition: Decomposition, batches: Batches, state: FitState, share: float) -> None:
    """Switch off the slices that are active in fewer than `share` of the sequences to come."""

    def to_come(generator: torch.Generator, number: int) -> Batch:
        return batches(generator, state.step + number)

    frequent = frequent_slices(target, decomposition, to_come, state.generators["data"], share)
    decomposition.importances.prune(frequent)


@torch.no_grad()
def frequent_slices(
    target: Target,
    decomposition: Decomposition,
    batches: Batches,
    generator: torch.Generator,
    share: float,
) -> dict[str, Tensor]:
    """Which slices are active in at least `share` of PRUNE_BATCHES batches' sequences, `[C]` bool a matrix."""
    counts: dict[str, Tensor] = {}
    sequences, batch = 0, None
    for number in range(PRUNE_BATCHES):
        previous, batch = batch, batches(generator, number)
        if batch is previous:  # a fixed set of prompts: once is enough
            break
        clean = clean_pass(target, batch, decomposition.names, outputs=False)
        g, _ = decomposition.importance(clean.inputs, clean.padding)
        sequences += len(batch.tokens)
        for name, values in g.items():
            active = ((values > 0) & batch.valid[..., None]).any(1).sum(0)
            counts[name] = active + counts.get(name, 0)
    return {name: count >= share * sequences for name, count in counts.items()}


def _record(
    state: FitState, step: Step, norms: dict[str, Tensor], settings: FitSettings, rate: float, annealed: float
) -> Record:
    terms = {name: loss.item() for name, loss in step.losses.items()}
    broad = settings.losses.on_stream(settings.targeted).coefficients
    coefficients = {**settings.losses.coefficients, **{f"{ON_STREAM}{name}": share for name, share in broad.items()}}
    return Record(
        step=state.step,
        losses=terms,
        total=sum(coefficients[name] * value for name, value in terms.items()),
        active={name: value.item() for name, value in step.active.items()},
        gradients={name: norm.item() for name, norm in norms.items()},
        rate=rate,
        p=annealed if settings.losses.anneals == "p" else None,
        gamma=annealed if settings.losses.anneals == "gamma" else None,
        seconds=state.seconds,
        always_on={name: int(count) for name, count in step.always_on.items()},
    )
