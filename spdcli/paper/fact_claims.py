"""What must hold of facts that are cut out of a language model, and what seeds and pairs of prompts say to it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spdcli.paper.table1 import Bound, Claim

Tables = Mapping[str, Sequence[Mapping[str, Any]]]  # of one seed: the `fact_table` of every pair


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


def fact_claims(pairs: Sequence[str]) -> list[Claim]:
    """Every bound of the pairs, for both ways to choose slices."""
    made = []
    for name in pairs:
        pair = PAIRS[name]
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
                    made.append(
                        Claim(f"{answer} by {method}: {SAID[key]}", finder(name, row, method, key), None, bound)
                    )
    return made


SAID = {
    "own": "its own change",
    "others": "change of the other prompt",
    "median_relative_change": "median change of known facts",
    "mean_relative_change": "mean change of known facts",
}


def finder(pair: str, row: int, method: str, key: str) -> Any:
    """Reads one number out of a seed's tables; NaN, which holds no bound, where there was no edit."""

    def find(tables: Tables) -> float:
        edit = tables[pair][row]["edits"].get(method)
        return float("nan") if edit is None else edit[key]

    return find


def method_rows(seeds: Sequence[Tables]) -> list[dict[str, Any]]:
    """One row a pair, prompt and method, over the seeds: mean, least and largest of each number."""
    rows = []
    for pair, table in seeds[0].items():
        for row, entry in enumerate(table):
            methods = dict.fromkeys(m for tables in seeds for m in tables[pair][row]["edits"])
            for method in methods:
                found = [tables[pair][row]["edits"][method] for tables in seeds if method in tables[pair][row]["edits"]]
                rows.append(
                    {
                        "pair": pair,
                        "prompt": entry["prompt"],
                        "token": entry["token"],
                        "method": method,
                        "seeds": len(found),
                        **{key: _spread([edit[key] for edit in found]) for key in NUMBERS},
                    }
                )
    return rows


NUMBERS = ("own", "others", "median_relative_change", "mean_relative_change", "max_relative_change", "norm")


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
