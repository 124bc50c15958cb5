"""How far an edit moves the facts that it should leave alone.

The relative change of a fact is |after / before - 1| of its answer's probability. An edit's *collateral* are the
`STATISTICS` of the relative changes over the facts that the unchanged model knows, with percentile intervals of a
bootstrap over those facts. Side effects have heavy tails, so that no single number says enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spdcli.edits.answer_changes import AnswerChange, AnswerChanges
from spdcli.edits.choices import STATISTICS
from spdcli.edits.facts_file import Known
from spdcli.records import ABSENT, Absent, spread

DRAWS = 2000
LEVEL = 0.95
WORST = 3


@dataclass(frozen=True, kw_only=True)
class ChangeSizes:
    """How large relative changes |after / before - 1| are.

    `relative_change` by statistic, and `interval`, the bootstrap percentile interval (low, high) of each at `level`;
    None of each where nothing was measured. The last two are ABSENT where no interval was drawn.
    """

    relative_change: Mapping[str, float | None] = field(metadata=spread("{}_relative_change"))
    interval: Mapping[str, tuple[float, float] | None] | Absent = ABSENT
    level: float | Absent = ABSENT


@dataclass(frozen=True, kw_only=True)
class Collateral(ChangeSizes):
    """How far an edit moves the facts that a model knows (`facts` of `spd.suppress/1`).

    The sizes are over the `known` of `asked` facts, and `worst` are the ones that moved most.
    """

    asked: int
    known: int
    worst: AnswerChanges


def mark_known(effects: AnswerChanges, known: Known) -> list[AnswerChange]:
    """The effects with `known` set: whether the unchanged model knows the answer."""
    return [replace(effect, known=known.holds(effect.before, effect.rank_before)) for effect in effects]


def relative_change(ratio: Tensor) -> Tensor:
    """|after / before - 1| of ratios after / before."""
    return (ratio - 1).abs()


def collateral(effects: AnswerChanges, seed: int = 0, draws: int = DRAWS) -> Collateral:
    """How far those facts among `effects` moved that are marked as known."""
    facts = [effect for effect in effects if effect.group == "fact"]
    known = [effect for effect in facts if effect.known]
    changes = relative_change(torch.tensor([effect.ratio for effect in known], dtype=torch.float64))
    sizes = summarise(changes, seed, draws)
    order = changes.argsort(descending=True, stable=True)[:WORST].tolist()
    return Collateral(
        asked=len(facts),
        known=len(known),
        relative_change=sizes.relative_change,
        interval=sizes.interval,
        level=sizes.level,
        worst=[known[row] for row in order],
    )


def summarise(changes: Tensor, seed: int = 0, draws: int = DRAWS) -> ChangeSizes:
    """The statistics of relative changes `[n]` with their bootstrap intervals; None of each where n is 0."""
    if not len(changes):
        return ChangeSizes(relative_change=dict.fromkeys(STATISTICS), interval=dict.fromkeys(STATISTICS), level=LEVEL)
    intervals = {name: tuple(bounds.tolist()) for name, bounds in bootstrap(changes, seed, draws).items()}
    return ChangeSizes(
        relative_change={name: value.item() for name, value in statistics(changes).items()},
        interval=intervals,
        level=LEVEL,
    )


def statistics(changes: Tensor) -> dict[str, Tensor]:
    """The numbers of `STATISTICS` over the last dimension."""
    return {name: statistic.of(changes) for name, statistic in STATISTICS.items()}


def bootstrap(changes: Tensor, seed: int, draws: int = DRAWS) -> dict[str, Tensor]:
    """Percentile intervals `[2]` of the statistics of `changes` `[n]`: `draws` times n of them with replacement."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(changes), (draws, len(changes)), generator=generator)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=changes.dtype)
    return {name: values.quantile(tails) for name, values in statistics(changes.cpu()[index]).items()}
