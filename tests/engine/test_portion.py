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


@dataclass
class Trained:
    """What a training came to: the records of all steps, the last gradients, and the parameters that they leave."""

    records: list[Record]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


Start = tuple[Subject, Decomposition]


def trained(start: Start, settings: FitSettings, stream: Batch | None, processes: Processes, by_rows: bool) -> Trained:
    subject, decomposition = start
    schedule = OptimiserSettings("adam", 0.01, 0.0, "constant", 0, settings.steps)
    state = start_fit(decomposition, schedule, 0, CPU)
    batches = lambda generator, number: subject.batch  # noqa: E731
    broad = None if stream is None else lambda generator, number: stream
    records = list(fit(subject.target, decomposition, batches, state, settings, broad, processes, by_rows))
    named = dict(decomposition.named_parameters())
    return Trained(records, {name: p.grad for name, p in named.items() if p.grad is not None}, named)


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
PLENTY, LITTLE = 1e12, 3e4  # bytes of a chunk
TARGETED = {"recon": 0.5, "stochastic_recon_partial": 2.0, "minimality": 0.1, "faithfulness": 3.0}
CASES = {  # target, gates, losses, processes, by rows, bytes, targeted
    "toy": ("toy", "attention", EVERY_LOSS, 5, False, PLENTY, 0),
    "toy, uneven": ("toy", "scalar", replace(EVERY_LOSS, subset="position", hidden_at="block"), 3, False, LITTLE, 0),
    "toy, rows": ("toy", "attention", replace(EVERY_LOSS, subset="position"), 3, True, LITTLE, 0),
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
    for one in shared([start() for _ in range(count)], settings, stream, by_rows):
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
