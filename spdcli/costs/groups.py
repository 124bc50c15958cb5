"""What a benchmark measures: cases, in groups whose members are compared. Imports nothing that takes time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Way = Literal["plan", "one by one", "plain", "product"]


@dataclass(frozen=True)
class Case:
    """What one process measures.

    `recipe` with `settings` (as `--set` takes them) says what is decomposed, with random weights; `way` how a step is
    made: by the engine (plan), every variant by itself (one by one), the same with the gate network made whole
    (plain), or, in place of a step, one square matrix product (product). `keep_freed` is the allocator's switch.
    `large` says that it may need more memory than there is, which is worked out, without numbers, before it is
    started. `prompts` are the (sequences, tokens of each) of a language model; `labels` go into the case's row.
    """

    name: str
    recipe: str
    settings: tuple[str, ...] = ()
    way: Way = "plan"
    keep_freed: bool = True
    large: bool = False
    prompts: tuple[int, int] = (2, 9)
    labels: Mapping[str, int] = field(default_factory=dict)


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
