"""Benchmarks: cases measured in processes of their own, side by side, in rounds that take turns.

The first step of every case is its warm-up, in which its operations are counted; then each round asks every process
of a group for one step in turn (A B A B ...), so that what else the machine does falls on all of them alike; medians
over the rounds are told. A square matrix product runs in a process of its own as one more member of every group: the
machine's own rate, at the same time.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from spdcli.costs.groups import Case, Group
from spdcli.costs.worker import COUNT, PEAK, STEP, Count, Failure, serve
from spdcli.errors import SpdError
from spdcli.progress import Progress, Report, silent

PRODUCT = Case("matrix product", "", way="product")
LONG_STEP = 30.0  # seconds; a case whose first step takes longer is measured by that step alone
SHARE = 0.5  # of the free memory, that a large case may need: others of its group, and other programs, need some too


@dataclass(frozen=True)
class Conditions:
    """How a benchmark is run: measured steps of every case, device, threads (None: torch's own choice)."""

    rounds: int = 3
    device: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True)
class Measurement:
    """What was measured of a case.

    `seconds` is the median of a step over the rounds, `steps` how many rounds that are and `fastest` the least of
    them. `peak_bytes` is the most memory that the case's process had at once, `base_bytes` what it had before anything
    was built. Of one step, `flops` are the floating-point operations of its products, `bytes` what its `operations`
    read and write. `flops_per_second` is their rate, `product_flops_per_second` that of one large matrix product in
    the same rounds, and `product_share` the first over the second.
    """

    seconds: float
    peak_bytes: int
    steps: int
    fastest: float
    base_bytes: int
    flops: int
    bytes: int
    operations: int
    flops_per_second: float
    product_flops_per_second: float
    product_share: float


@dataclass(frozen=True)
class Row:
    """A case of a benchmark and its measurement, or, for one that was never started, why: `skipped`, in words."""

    case: Case
    measurement: Measurement | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Results:
    """What a benchmark gives: a row a case, in order, and the ratios that its groups ask for, by name."""

    rows: list[Row]
    ratios: dict[str, float]


class Member:
    """One case's process, seen from here."""

    def __init__(self, case: Case, conditions: Conditions) -> None:
        context = multiprocessing.get_context("spawn")
        self.case = case
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, case, conditions.device, conditions.threads), daemon=True
        )
        self.process.start()
        theirs.close()
        self.seconds: list[float] = []  # of each measured step
        self.count: Count | None = None  # of the first step
        self.base: int = self._answer()

    def first_step(self) -> None:
        """Make one step and count it; it is measured only if it is a LONG_STEP, and then no other follows."""
        self.count = count = self.request(COUNT)
        if count.seconds >= LONG_STEP:
            self.seconds = [count.seconds]

    def step(self, limit: float) -> None:
        """Make one more step, unless it is not the first and all of them would take more than `limit` seconds."""
        assert self.count is not None
        each = self.count.seconds
        if each < LONG_STEP and (not self.seconds or each * (len(self.seconds) + 1) <= limit):
            self.seconds.append(self.request(STEP))

    def request(self, what: str) -> Any:
        """The process's answer to STEP, COUNT or PEAK; SpdError, naming the case, where it failed."""
        self.connection.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError:
            self.process.join()
            raise SpdError(
                f"{self.case.name}: its process ended with code {self.process.exitcode}, for want of memory as a rule",
                "a smaller --batch, or fewer cases by --case",
            ) from None
        if isinstance(answer, Failure):
            raise SpdError(f"{self.case.name}: {answer.reason}")
        return answer


@contextmanager
def started(cases: Iterable[Case], conditions: Conditions) -> Iterator[list[Member]]:
    """The processes of `cases`, built one after the other; none is left behind."""
    members: list[Member] = []
    try:
        for case in cases:
            members.append(Member(case, conditions))
        yield members
    finally:
        for member in members:
            member.connection.close()
            member.process.terminate()
            member.process.join()


def measure(groups: Sequence[Group], conditions: Conditions, report: Report = silent) -> Results:
    """Build the cases of each group, make `conditions.rounds` measured steps of each in turns, and compare them.

    A large case that needs more than its SHARE of the free memory is never started, and its row says so. `report`
    hears of every step before it is made.
    """
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    steps = conditions.rounds + 1
    total, done = sum(len(group.cases) for group in groups) * steps, 0
    for group in groups:
        skipped = {case.name: why for case in group.cases if (why := too_large(case, conditions.device))}
        done += len(skipped) * steps
        cases = [case for case in group.cases if case.name not in skipped]
        with started([PRODUCT, *cases] if cases else [], conditions) as members:
            for number in range(steps):
                for member in members:
                    report(Progress(member.case.name, done, total))
                    if number == 0:
                        member.first_step()
                    else:
                        member.step(math.inf if member is members[0] else group.seconds)
                    done += member is not members[0]
            measurements = {member.case.name: measurement(member, members[0]) for member in members[1:]}
        rows += [Row(case, measurements.get(case.name), skipped.get(case.name, "")) for case in group.cases]
        ratios |= ratios_of(group, measurements)
    return Results(rows, ratios)


def ratios_of(group: Group, measurements: Mapping[str, Measurement]) -> dict[str, float]:
    """The ratios that a group asks for, of those of its cases, by name, that were measured."""
    ratios = {}
    for pairs, key in ((group.ratios, "seconds"), (group.memory, "peak_bytes")):
        for name, (above, below) in pairs.items():
            if above in measurements and below in measurements:
                ratios[name] = getattr(measurements[above], key) / getattr(measurements[below], key)
    for name, three in group.growth.items():
        if measurements.keys() >= set(three):
            small, middle, large = (measurements[case].peak_bytes for case in three)
            if middle > small:
                ratios[name] = (large - middle) / (middle - small)
    return ratios


def too_large(case: Case, device: str) -> str:
    """Why a large case cannot be measured here, in words; nothing where it can."""
    if not case.large:
        return ""
    import torch

    from spdcli.costs.estimate import estimate
    from spdcli.recipe.reading import load_recipe

    plan = estimate(load_recipe(case.recipe, case.settings), torch.device(device), seconds=False)
    needed, free = plan.bytes.total, plan.free_bytes
    if needed <= SHARE * free:
        return ""
    return f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free, of which a case may have {SHARE:.0%}"


def measurement(member: Member, product: Member) -> Measurement:
    """What was measured of a member, beside the matrix product of its group."""
    assert member.count is not None
    assert product.count is not None
    seconds = statistics.median(member.seconds)
    rate = member.count.flops / seconds
    product_rate = product.count.flops / statistics.median(product.seconds)
    return Measurement(
        seconds=seconds,
        peak_bytes=member.request(PEAK),
        steps=len(member.seconds),
        fastest=min(member.seconds),
        base_bytes=member.base,
        flops=member.count.flops,
        bytes=member.count.bytes,
        operations=member.count.operations,
        flops_per_second=rate,
        product_flops_per_second=product_rate,
        product_share=rate / product_rate,
    )
