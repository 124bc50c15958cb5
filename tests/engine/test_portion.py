"""Several processes that share a step against one that makes it alone: losses, gradients, active slices."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from twins import COEFFICIENTS, Subject, close, decompose, language_subject, looked_at, toy_subject

from spdcli.engine.adversary import Attack
from spdcli.engine.fit import FitSettings, Record, fit, start_fit
from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.optimise import OptimiserSettings
from spdcli.engine.portion import cut
from spdcli.engine.processes import Processes
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Batch

DIVIDING = 3  # processes that divide their moments, in these tests
TOLERANCE = 1e-9  # float64, after sums in another order
CPU = torch.device("cpu")


@dataclass
class Table:
    """What processes that are threads of one say to each other: a tensor each."""

    count: int
    said: list[Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.said = [None] * self.count
        self.barrier = threading.Barrier(self.count, timeout=60)


@dataclass(frozen=True)
class Threads(Processes):
    """Processes that are threads around one table."""

    table: Table = field(default_factory=lambda: Table(1))

    def _sum(self, tensor: Tensor) -> None:
        self.table.said[self.rank] = tensor.clone()
        self.table.barrier.wait()
        total = sum(self.table.said[1:], self.table.said[0])
        self.table.barrier.wait()
        tensor.copy_(total)

    def _send(self, tensor: Tensor, rank: int) -> None:
        self.table.said[self.rank] = tensor.clone()
        self.table.barrier.wait()
        sent = self.table.said[rank]
        self.table.barrier.wait()
        tensor.copy_(sent)


@dataclass
class Trained:
    """What a training came to: the records of all steps, the last gradients, the parameters that they leave and, in the
    first process, the optimizer's moments."""

    records: list[Record]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    moments: dict[int, dict[str, Tensor]]
    held: int  # numbers that this process's optimizer keeps


Start = tuple[Subject, Decomposition]


def trained(start: Start, settings: FitSettings, stream: Batch | None, processes: Processes, by_rows: bool) -> Trained:
    subject, decomposition = start
    schedule = OptimiserSettings("adam", 0.01, 0.0, "constant", 0, settings.steps)
    state = start_fit(decomposition, schedule, 0, CPU, processes=processes if processes.count == DIVIDING else None)
    batches = lambda generator, number: subject.batch  # noqa: E731
    broad = None if stream is None else lambda generator, number: stream
    records = list(fit(subject.target, decomposition, batches, state, settings, broad, processes, by_rows))
    named = dict(decomposition.named_parameters())
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
    held = sum(tensor.numel() for kept in state.optimiser.state.values() for tensor in kept.values())
    return Trained(records, gradients, named, state.moments(), held)


def shared(starts: list[Start], settings: FitSettings, stream: Batch | None, by_rows: bool) -> list[Trained]:
    """As `trained`, by a process for each of `starts`: a pass replaces modules of its target."""
    table, results = Table(len(starts)), {}
    errors: list[BaseException] = []

    def live(rank: int) -> None:
        try:
            processes = Threads(rank, len(starts), table)
            results[rank] = trained(starts[rank], settings, stream, processes, by_rows)
        except BaseException as error:
            errors.append(error)
            table.barrier.abort()

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(len(starts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(len(starts))]


ATTACKED = LossSettings({"adversarial_recon": 1, "adversarial_recon_partial": 1, "recon": 1}, attack=Attack(steps=2))
PERSISTENT = LossSettings(
    {"adversarial_recon": 1, "stochastic_recon": 1, "attention": 0.5},
    attack=Attack(persistent=True, shared=False, steps=2),
)
EVERY_LOSS = LossSettings(COEFFICIENTS, epsilon=1e-6, samples=2)
PLENTY, LITTLE = 1e12, 7e4  # bytes of a chunk: three sequences of the toy
TARGETED = {"recon": 0.5, "stochastic_recon_partial": 2.0, "minimality": 0.1, "faithfulness": 3.0}
CASES = {  # target, gates, losses, processes, by rows, bytes, targeted
    "toy": ("toy", "attention", EVERY_LOSS, 5, False, LITTLE, 0),
    "toy, uneven": ("toy", "scalar", replace(EVERY_LOSS, subset="position", hidden_at="block"), 3, False, PLENTY, 0),
    "toy, rows": (
        "toy",
        "attention",
        replace(EVERY_LOSS, subset="position", hidden_scale="sequence"),
        3,
        True,
        LITTLE,
        0,
    ),
    "llama": ("llama", "shared", replace(EVERY_LOSS, delta_masks="corner", faithfulness_probes=2), 2, False, PLENTY, 0),
    "llama, rows": ("llama", "scalar", replace(EVERY_LOSS, layerwise_matrices=2), 4, True, PLENTY, 0),
    "llama, joint gates": ("llama", "global", replace(EVERY_LOSS, penalty="smooth_l0"), 2, True, PLENTY, 0),
    "targeted": ("toy", "scalar", LossSettings(TARGETED, epsilon=1e-6), 3, True, PLENTY, 0.5),
    "adversary": ("toy", "vector", PERSISTENT, 2, False, LITTLE, 0),
    "adversary, rows": ("toy", "vector", ATTACKED, 4, True, LITTLE, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_processes_make_the_step_of_one(case, tiny_llama_dir):
    target, kind, losses, count, by_rows, budget, targeted = CASES[case]

    def start() -> Start:
        made = (
            toy_subject(5, layers=1, heads=2, feed_forward=True)
            if target == "toy"
            else language_subject(tiny_llama_dir)
        )
        subject = Subject(made.target, made.logits, looked_at(made.batch, "some"))
        return subject, decompose(subject.target, kind=kind, heads=2, width=8)

    stream = Batch.everywhere(torch.randint(10, (7, 7))) if targeted else None
    settings = FitSettings(2, log_every=1, plan_bytes=budget, losses=losses, targeted=targeted)
    alone = trained(start(), settings, stream, Processes(), False)
    assert len(alone.records) == 2
    together = shared([start() for _ in range(count)], settings, stream, by_rows)
    assert together[0].moments.keys() == alone.moments.keys()
    for number, kept in alone.moments.items():
        for name, tensor in kept.items():
            close(together[0].moments[number][name].double(), tensor.double(), TOLERANCE)
    if count == DIVIDING:
        assert sum(one.held for one in together) == alone.held
        assert max(one.held for one in together) < 0.6 * alone.held
    for one in together:
        for record, expected in zip(one.records, alone.records, strict=True):
            assert record.losses == pytest.approx(expected.losses, rel=TOLERANCE)
            assert record.active == pytest.approx(expected.active)
            assert record.always_on == expected.always_on
            assert record.gradients == pytest.approx(expected.gradients, rel=TOLERANCE)
        assert one.gradients.keys() == alone.gradients.keys()
        for name, gradient in alone.gradients.items():
            close(one.gradients[name], gradient, TOLERANCE)
        for name, parameter in alone.parameters.items():
            close(one.parameters[name].double(), parameter.double(), TOLERANCE)


def test_what_is_cut_covers_all_and_is_even_over_turns():
    for total, count in ((5, 3), (2, 8), (7, 7), (0, 2)):
        rows = [0] * count
        for turn in range(count):
            parts = [cut(total, rank, count, turn) for rank in range(count)]
            assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
            assert parts[-1][1] == total
            rows = [row + stop - start for row, (start, stop) in zip(rows, parts, strict=True)]
        assert set(rows) == {total}


def test_divided_moments_are_loaded_by_their_owners():
    schedule = OptimiserSettings("adam", 0.01, 0.0, "constant", 0, 2)
    decomposition = decompose(toy_subject().target)
    alone = start_fit(decomposition, schedule, 0, CPU)
    parameters = [parameter for group in alone.groups for parameter in group]
    moments = {
        number: {"step": torch.tensor(4.0), "exp_avg": torch.rand_like(p), "exp_avg_sq": torch.rand_like(p)}
        for number, p in enumerate(parameters)
        if number != 2  # one that no loss has reached yet
    }
    places = []
    for rank in range(DIVIDING):
        state = start_fit(decomposition, schedule, 0, CPU, processes=Processes(rank, DIVIDING))
        state.load_moments(moments)
        for number in state.ownership.own_numbers:
            kept = state.optimiser.state.get(parameters[number], {})
            assert kept.keys() == moments.get(number, {}).keys()
            assert all(torch.equal(tensor, moments[number][name]) for name, tensor in kept.items())
        places += state.ownership.own_numbers
    assert sorted(places) == list(range(len(parameters)))
