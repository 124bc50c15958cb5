"""Results about what slices do over text, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generate.markdown import code, joined, number, table

Data = Mapping[str, Any]

SHOWN = 8  # slices, the ones that are active most often first


def harvest(data: Data) -> str:
    """`spd.harvest/1`: how often slices are active over the text, and the first context of the most frequent."""
    alive = [one for one in data["slices"] if one["density"] > 0]
    first = sorted(alive, key=lambda one: -one["density"])[:SHOWN]
    rows = [[code(one["slice"]), f"{one['density']:.1%}", context(one)] for one in first]
    return joined(
        [
            f"{len(alive)} of {len(data['slices'])} slices are active somewhere in {data['tokens']:,} tokens; "
            f"{number(sum(one['density'] for one in alive))} at a token.",
            table(["slice", "tokens where it is active", "its strongest context"], rows, words=1),
        ]
    )


def search(data: Data) -> str:
    """`spd.search/1`: the slices whose contexts have the words."""
    rows = [[code(one["slice"]), one["at_words"], f"{one['density']:.1%}", context(one)] for one in data["matches"]]
    return table(["slice", "contexts at the words", "active", "first context"], rows, words=1)


def context(one: Data) -> str:
    """The strongest context of a slice on one line, its token marked."""
    if not one["examples"]:
        return ""
    first = one["examples"][0]
    tokens = [f"«{token}»" if at == first["position"] else token for at, token in enumerate(first["tokens"])]
    return code(" ".join("".join(tokens).split()))
