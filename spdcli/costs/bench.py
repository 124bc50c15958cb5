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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from spdcli.costs.worker import Case, serve
from spdcli.errors import SpdError

PRODUCT = Case("matrix product", "", way="product")
LONG_STEP = 30.0  # seconds; a case whose first step takes longer is measured by that step alone
SHARE = 0.5  # of the free memory, that a large case may need: others of its group, and other programs, need some too
Say = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Group:
    """Cases that are measured side by side, and the ratios of their seconds that are wanted.

    `ratios[name]` is (numerator, denominator), two names of cases; so is `memory`, of their peaks. `growth[name]` is
    three cases of sizes s, 2s and 4s: the second growth of the peak over the first, 2 where memory grows in
    proportion to the size, 4 where with its square. `seconds` bounds what the measured steps of one case take, by its
    first step: then it makes fewer than other cases, but one.
    """

    cases: Sequence[Case]
    ratios: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    memory: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    growth: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    seconds: float = math.inf


@dataclass(frozen=True)
class Conditions:
    """How a benchmark is run: measured steps of every case, device, threads (None: torch's own choice)."""

    rounds: int = 3
    device: str = "cpu"
    threads: int | None = None


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
        self.seconds: list[float] = []
        self.took = 0.0  # by the first step
        self.counted: dict[str, Any] = {}
        self.base = self._answer()["ready"]

    def first_step(self) -> None:
        """Make one step and count it; it is measured only if it is a LONG_STEP, and then no other follows."""
        self.counted = self.ask("count")
        self.took = self.counted.pop("seconds")
        if self.took >= LONG_STEP:
            self.seconds = [self.took]

    def step(self, limit: float) -> None:
        """Make one more step, unless it is not the first and all of them would take more than `limit` seconds."""
        if self.took < LONG_STEP and (not self.seconds or self.took * (len(self.seconds) + 1) <= limit):
            self.seconds.append(self.ask("step")["seconds"])

    def ask(self, what: str) -> dict[str, Any]:
        """The process's answer to `what`; SpdError, naming the case, where it failed."""
        self.connection.send(what)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            answer = self.connection.recv()
        except EOFError:
            self.process.join()
            raise SpdError(
                f"{self.case.name}: its process ended with code {self.process.exitcode}, for want of memory as a rule",
                "a smaller --batch, or fewer cases by --case",
            ) from None
        if "error" in answer:
            raise SpdError(f"{self.case.name}: {answer['error']}")
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


def measure(groups: Sequence[Group], conditions: Conditions, say: Say) -> dict[str, Any]:
    """Rows and ratios of all groups, as `spd bench --json` shows them.

    A row: `seconds` is the median of a step over the rounds, `fastest` the least of them, `peak_bytes` the most memory
    that the case's process had at once, `base_bytes` what it had before anything was built, `flops` those of one
    step's matrix products, `bytes` what its operations read and write, `flops_per_second` of the two, and
    `product_share` that rate over the rate of one large matrix product in the same rounds. A large case that needs
    more than its SHARE of the free memory is never started: its row says so, as `skipped`, and has no numbers.
    """
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    total = sum(len(group.cases) for group in groups) * (conditions.rounds + 1)
    done = 0
    for group in groups:
        skipped = {case.name: why for case in group.cases if (why := too_large(case, conditions.device))}
        done += len(skipped) * (conditions.rounds + 1)
        cases = [case for case in group.cases if case.name not in skipped]
        with started([PRODUCT, *cases] if cases else [], conditions) as members:
            for number in range(conditions.rounds + 1):
                for member in members:
                    say(member.case.name, done, total)
                    if number == 0:
                        member.first_step()
                    else:
                        member.step(math.inf if member is members[0] else group.seconds)
                    done += member is not members[0]
            found = {member.case.name: row(member, members[0]) for member in members[1:]}
        rows += [found.get(case.name) or told(case) | {"skipped": skipped[case.name]} for case in group.cases]
        ratios |= ratios_of(group, found)
    return {"rows": rows, "ratios": ratios}


def ratios_of(group: Group, found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What a group says of its cases, where they were measured: `found[name]` is a case's row."""
    ratios = {}
    for pairs, key in ((group.ratios, "seconds"), (group.memory, "peak_bytes")):
        for name, (above, below) in pairs.items():
            if above in found and below in found:
                ratios[name] = found[above][key] / found[below][key]
    for name, three in group.growth.items():
        if found.keys() >= set(three):
            small, middle, large = (found[case]["peak_bytes"] for case in three)
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

    found = estimate(load_recipe(case.recipe, case.settings), torch.device(device), seconds=False)
    needed, free = found["bytes"]["total"], found["free_bytes"]
    if needed <= SHARE * free:
        return ""
    return f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free, of which a case may have {SHARE:.0%}"


def told(case: Case) -> dict[str, Any]:
    """What a row says of its case, whatever it measured."""
    return {
        "name": case.name,
        "way": case.way,
        "recipe": case.recipe,
        "settings": list(case.settings),
        "keep_freed": case.keep_freed,
        **case.labels,
    }


def row(member: Member, product: Member) -> dict[str, Any]:
    """What a member has measured."""
    case, seconds = member.case, statistics.median(member.seconds)
    rate = member.counted["flops"] / seconds
    product_rate = product.counted["flops"] / statistics.median(product.seconds)
    return {
        "name": case.name,
        "seconds": seconds,
        "peak_bytes": member.ask("peak")["peak_bytes"],
        "steps": len(member.seconds),
        "fastest": min(member.seconds),
        "base_bytes": member.base,
        **member.counted,
        "flops_per_second": rate,
        "product_flops_per_second": product_rate,
        "product_share": rate / product_rate,
        **told(case),
    }
