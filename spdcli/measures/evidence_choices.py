"""Which masks a decomposition is put to, and how hard worse ones are sought. Torch-free: help and tables read it."""

from __future__ import annotations

from dataclasses import dataclass

from spdcli.engine.tables import Choice

STEPS, SIZE = 20, 0.1  # of the search that decompositions are compared by
CURVE = (5, 10, 20, 40, 80, 160, 320)  # steps, whose number times size is always the same:
REACH = STEPS * SIZE  # so that a mask can cross the box twice
STARTS = 8  # random ones; the two corners of the box come on top
FEW = 2  # random starts of the other searches: with the delta off, by position, and of a point of the curve
SEQUENCES = 256  # of the toy, that are attacked


@dataclass(frozen=True)
class Corner(Choice):
    """Masks that need no search: importances, or with `on` all 1; and the `delta`'s mask, the same everywhere."""

    on: bool = False
    delta: float = 0.0


CORNERS: dict[str, Corner] = {
    "corner_0": Corner("importance masks, delta 0"),
    "corner_half": Corner("importance masks, delta ½ everywhere", delta=0.5),
    "corner_1": Corner("importance masks, delta 1 everywhere", delta=1.0),
    "all_on_0": Corner("every slice on, delta 0", on=True),
    "all_on_half": Corner("every slice on, delta ½ everywhere", on=True, delta=0.5),
}
MASKS: dict[str, str] = {  # where masks come from, in the words of tables
    "importance": "importance masks, delta off",
    "stochastic": "drawn anew for every slice and position",
    **{name: corner.about for name, corner in CORNERS.items()},
    "pgd_shared": "sought, shared by all positions",
    "pgd_shared_delta_off": "sought, shared, delta off",
    "pgd_by_position": "sought, at every position",
}

ADVERSARIES: dict[str, Choice] = {
    "none": Choice("no search: importance masks, random masks and the corners alone"),
    "quick": Choice(f"{STEPS} steps of {SIZE} on masks that all sequences and positions share, delta attacked and off"),
    "curve": Choice(
        f"quick; {', '.join(map(str, CURVE))} steps of {REACH:g} in all; and other masks at every position"
    ),
}
USUAL_ADVERSARY = "quick"


@dataclass(frozen=True)
class MaskSearch:
    """What is sought: `kind` is a key of ADVERSARIES, `starts` how many random starts the quick search has."""

    kind: str = USUAL_ADVERSARY
    starts: int = STARTS


NO_SEARCH = MaskSearch("none")
