"""Slices at a token: which are active, how strongly, for this prompt alone or not, and what they read and write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import UsageError
from spdcli.measures.importances import active_in, importances_of
from spdcli.measures.labels import TokenLens
from spdcli.measures.texts import Texts
from spdcli.runs.subject import Subject

TOY_SEQUENCES = 4


@dataclass(frozen=True)
class Query:
    """What `spd inspect` asks: a token (None: every position), matrices, how many slices and labels, a threshold."""

    token: str | None
    matrices: tuple[str, ...] = ("*",)
    top: int = 20
    labels: int = 5
    threshold: float = 0.0


def inspect_slices(
    subject: Subject, decomposition: Decomposition, own: Texts, shown: Texts, query: Query
) -> dict[str, Any]:
    """The occurrences of a token in `shown` with their active slices (contract `spd.inspect/1`), and a heat a prompt.

    A slice is unique to a prompt when it is active in no other one, of those shown and of the run's `own`. Slices are
    ordered by importance, unique ones first, then by the norm of what they write; `active` counts those that `top`
    leaves out too. `heat[prompt]` is the sum of importances a position.
    """
    g, inner = importances_of(subject, decomposition, shown.batch)
    chosen = matching(list(g), query.matrices)
    if query.token is None:
        places = [(row, position) for row, position in shown.batch.valid.nonzero().tolist()]
    else:
        places = shown.find(query.token)
    unique = _unique(subject, decomposition, own, shown, g, query.threshold)
    lens = TokenLens(subject.target, subject.routes, subject.token_text)
    occurrences = [
        {
            "prompt": row,
            "text": shown.texts[row],
            "position": position,
            "token": shown.pieces[row][position],
            "active": sum(int((g[name][row, position] > query.threshold).sum()) for name in chosen),
            "slices": _slices_at(decomposition, g, inner, unique, chosen, (row, position), query),
        }
        for row, position in places
    ]
    _label([entry for occurrence in occurrences for entry in occurrence["slices"]], decomposition, lens, query.labels)
    heat = torch.stack([g[name].sum(-1) for name in chosen]).sum(0)
    lengths = [len(tokens) for tokens in shown.pieces]
    rows = sorted({row for row, _ in places})
    return {
        "token": query.token,
        "occurrences": occurrences,
        "heat": [{"prompt": r, "tokens": shown.pieces[r], "importance": heat[r, : lengths[r]].tolist()} for r in rows],
    }


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The matrices among a run's `names` that one of `patterns` matches; UsageError where there is none."""
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise UsageError(
            f"no decomposed matrix matches {' or '.join(repr(p) for p in patterns)}",
            f"the run has {', '.join(names[:6])}{' …' if len(names) > 6 else ''}",
        )
    return chosen


def _unique(
    subject: Subject,
    decomposition: Decomposition,
    own: Texts,
    shown: Texts,
    g: Mapping[str, Tensor],
    threshold: float,
) -> dict[str, Tensor]:
    """Whether each slice is active in this prompt and no other, `[B, C]` bool a matrix."""
    here = active_in(g, threshold)
    counts = {name: active.sum(0) for name, active in here.items()}
    others = [row for row, text in enumerate(own.texts) if text not in shown.texts]
    if own is not shown and others:
        elsewhere, _ = importances_of(subject, decomposition, own.batch.select(torch.tensor(others)))
        counts = {name: counts[name] + active.sum(0) for name, active in active_in(elsewhere, threshold).items()}
    return {name: active & (counts[name] == 1) for name, active in here.items()}


def _slices_at(
    decomposition: Decomposition,
    g: Mapping[str, Tensor],
    inner: Mapping[str, Tensor],
    unique: Mapping[str, Tensor],
    names: Sequence[str],
    place: tuple[int, int],
    query: Query,
) -> list[dict[str, Any]]:
    """The active slices at one place, most important first."""
    row, position = place
    found: list[tuple[float, bool, float, str, int]] = []
    for name in names:
        here = g[name][row, position]
        written = inner[name][row, position].abs() * decomposition.of(name).V.norm(dim=1)
        found += [
            (here[c].item(), bool(unique[name][row, c]), written[c].item(), name, c)
            for c in (here > query.threshold).nonzero()[:, 0].tolist()
        ]
    found.sort(key=lambda entry: (-entry[0], not entry[1], -entry[2]))
    return [
        {
            "slice": f"{name}:{index}",
            "importance": importance,
            "unique": alone,
            "activation": inner[name][row, position, index].item(),
        }
        for importance, alone, _, name, index in found[: query.top]
    ]


def _label(entries: Sequence[dict[str, Any]], decomposition: Decomposition, lens: TokenLens, top: int) -> None:
    """Add to every entry the tokens that its slice promotes and reads, for the sign of its activation.

    One product with the vocabulary a matrix, however many of its slices are shown, and wherever.
    """
    by_matrix: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        by_matrix.setdefault(entry["slice"].rpartition(":")[0], []).append(entry)
    for name, own in by_matrix.items():
        slices = decomposition.of(name)
        index = torch.tensor([int(entry["slice"].rpartition(":")[2]) for entry in own], device=slices.U.device)
        signs = torch.tensor([-1.0 if entry["activation"] < 0 else 1.0 for entry in own], device=slices.U.device)
        promoted = lens.promotes(name, slices.V[index], top, signs)
        read = lens.reads(name, slices.U[:, index], top, signs)
        for entry, promotes, reads in zip(own, promoted, read, strict=True):
            entry |= {"promotes": promotes, "reads": reads}
