"""The slices of a run that are active on its own texts, each with where it is, and what it reads and promotes.

B prompts, T positions, C slices of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spdcli.explorer.exploration import Exploration
from spdcli.measures.inspection import SliceActivity

MOST_SLICES = 400
MOST_PLACES = 10
AROUND = 4  # tokens on either side of a place that are shown


@dataclass(frozen=True)
class Place:
    """Where a slice is active: the number of the `prompt` (from 1), the `token` with what stands around it, and the
    importance there."""

    prompt: int
    before: str
    token: str
    after: str
    importance: float


@dataclass(frozen=True)
class SliceEntry:
    """One slice: its address; the largest importance; at how many positions and in how many prompts it is active;
    `places`, the most important first; and the tokens that it reads and promotes."""

    address: str
    importance: float
    positions: int
    prompts: int
    places: Sequence[Place]
    reads: Sequence[str]
    promotes: Sequence[str]


def slice_entries(exploration: Exploration, most: int = MOST_SLICES) -> tuple[list[SliceEntry], int]:
    """The `most` most important active slices, and how many are active in all.

    A slice is as important as at its most important position; ties go to the one that is active at more of them.
    """
    ranked = []
    for name, g in exploration.activity.g.items():
        active = g > exploration.query.threshold
        peak, positions, prompts = g.amax((0, 1)), active.sum((0, 1)), active.any(1).sum(0)
        for c in positions.nonzero()[:, 0].tolist():
            ranked.append((peak[c].item(), int(positions[c]), int(prompts[c]), name, c))
    ranked.sort(key=lambda one: (-one[0], -one[1]))
    chosen = ranked[:most]
    bare = [strongest(exploration, name, c) for _, _, _, name, c in chosen]
    entries = [
        SliceEntry(f"{name}:{c}", peak, positions, prompts, places(exploration, name, c), one.reads, one.promotes)
        for (peak, positions, prompts, name, c), one in zip(chosen, exploration.labelled(bare), strict=True)
    ]
    return entries, len(ranked)


def strongest(exploration: Exploration, name: str, c: int) -> SliceActivity:
    """A slice at its most important place, without labels."""
    g, inner = exploration.activity.g[name][..., c], exploration.activity.inner[name][..., c]
    at = int(g.argmax())
    return SliceActivity(f"{name}:{c}", g.flatten()[at].item(), False, inner.flatten()[at].item())


def places(exploration: Exploration, name: str, c: int) -> list[Place]:
    """The places where a slice is most important."""
    g, own = exploration.activity.g[name][..., c], exploration.own
    found = []
    for row, at in (g > exploration.query.threshold).nonzero().tolist():
        found.append((g[row, at].item(), row, at))
    found.sort(key=lambda one: -one[0])
    shown = []
    for importance, row, at in found[:MOST_PLACES]:
        pieces = own.pieces[row]
        gap = "" if exploration.run.subject.toy is None else " "
        before, after = gap.join(pieces[max(0, at - AROUND) : at]), gap.join(pieces[at + 1 : at + 1 + AROUND])
        shown.append(Place(row + 1, before, pieces[at], after, importance))
    return shown
