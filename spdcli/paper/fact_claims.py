"""The pairs of facts that `spd reproduce facts` cuts out of a language model, and how large each change may be.

A pair is decomposed together, and each of its facts is cut in two ways: by rule and by effect. Of each cut four changes
are bounded: of the fact's own answer, of the other prompt of the pair, and the median and mean of the known facts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spdcli.paper.verdict import Bound, Claim, Evidence

Tables = Mapping[str, Sequence[Mapping[str, Any]]]  # of one seed: by pair the `fact_table`, as JSON


@dataclass(frozen=True)
class Pair:
    """Two prompts that are decomposed together, with the last token of each one's subject.

    `falls` are the least falls of their answers by the rule.
    Only of a `stated` pair do bounds decide; those of the others say what counts as agreeing.
    """

    prompts: tuple[str, str]
    subjects: tuple[str, str]
    falls: tuple[float, float]
    stated: bool


PAIRS = {
    "athletes": Pair(
        ("Kobe Bryant plays professional basketball", "Tiger Woods plays professional golf"),
        (" Bryant", " Woods"),
        (0.6, 0.8),
        True,
    ),
    "painters": Pair(
        ("Pablo Picasso was a painter from Spain", "Claude Monet was a painter from France"),
        (" Picasso", " Monet"),
        (0.6, 0.6),
        False,
    ),
    "landmarks": Pair(
        ("The Eiffel Tower is located in the city of Paris", "The Acropolis is located in the city of Athens"),
        (" Tower", "ropolis"),
        (0.6, 0.6),
        False,
    ),
}
EFFECT_FALL = 0.8  # of either answer, by slices chosen for it
OTHERS, MEDIAN, MEAN = 0.1, 0.02, 0.05  # relative changes: of the other prompt, of the known facts
CHANGES = {  # the bounded numbers of an edit, in words
    "own": "its own change",
    "others": "change of the other prompt",
    "median_relative_change": "median change of known facts",
    "mean_relative_change": "mean change of known facts",
}


def fact_claims(pairs: Mapping[str, Pair]) -> list[Claim]:
    """Every bound of the pairs, for both ways to choose slices."""
    claims = []
    for name, pair in pairs.items():
        for method, falls in (("rule", pair.falls), ("effect", (EFFECT_FALL, EFFECT_FALL))):
            for row, fall in enumerate(falls):
                answer = pair.prompts[row].rpartition(" ")[2]
                limits = {
                    "own": (-fall, f"≤ {-fall:.0%}"),
                    "others": (OTHERS, f"< {OTHERS:.0%}"),
                    "median_relative_change": (MEDIAN, f"< {MEDIAN:.0%}"),
                    "mean_relative_change": (MEAN, f"< {MEAN:.0%}"),
                }
                for key, (limit, words) in limits.items():
                    bound = Bound(None, limit, pair.stated, strict=key != "own", words=words)
                    number = edit_number(name, row, method, key)
                    claims.append(Claim(f"{answer} by {method}: {CHANGES[key]}", number, None, bound))
    return claims


def edit_number(pair: str, row: int, method: str, key: str) -> Callable[[Evidence], float]:
    """Reads one number of an edit out of a seed's tables; NaN, which holds no bound, where there was no edit."""

    def read(tables: Evidence) -> float:
        edit = tables[pair][row]["edits"].get(method)
        return float("nan") if edit is None else edit[key]

    return read


@dataclass(frozen=True)
class Range:
    """A number over seeds."""

    mean: float
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """What one method's edit does to a prompt of a pair over the `seeds` on which it is there."""

    pair: str
    prompt: str
    token: str
    method: str
    seeds: int
    own: Range
    others: Range
    median_relative_change: Range
    mean_relative_change: Range
    max_relative_change: Range
    norm: Range


NUMBERS = ("own", "others", "median_relative_change", "mean_relative_change", "max_relative_change", "norm")


def method_rows(seeds: Sequence[Tables]) -> list[MethodRow]:
    """One row a pair, prompt and method, over the seeds."""
    rows = []
    for pair, table in seeds[0].items():
        for row, entry in enumerate(table):
            for method in dict.fromkeys(method for tables in seeds for method in tables[pair][row]["edits"]):
                edits = [tables[pair][row]["edits"][method] for tables in seeds if method in tables[pair][row]["edits"]]
                ranges = {key: range_of([edit[key] for edit in edits]) for key in NUMBERS}
                rows.append(
                    MethodRow(
                        pair=pair,
                        prompt=entry["prompt"],
                        token=entry["token"],
                        method=method,
                        seeds=len(edits),
                        **ranges,
                    )
                )
    return rows


def range_of(values: Sequence[float]) -> Range:
    """Mean, least and largest of some values."""
    return Range(statistics.fmean(values), min(values), max(values))
