"""Slices at a token: which are active, how strongly, for this prompt alone or not, and what they read and write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spdcli.engine.subcomponents import Decomposition
from spdcli.measures.importances import active_in, importances_of, warn_of_span
from spdcli.measures.labels import TokenLens
from spdcli.measures.matrix_patterns import matrices_like
from spdcli.measures.texts import Texts, chosen_texts, own_texts
from spdcli.progress import Report, silent
from spdcli.records import ABSENT, Absent
from spdcli.runs.subject import Subject


@dataclass(frozen=True)
class SliceActivity:
    """One slice at one place: its address, its importance in [0, 1], and its inner activation `x . u`.

    `unique`: it is active in this prompt and in no other. `promotes` are the tokens whose logits it raises most, and
    `reads` those that drive it most, for the sign of its activation.
    """

    slice: str
    importance: float
    unique: bool
    activation: float
    promotes: Sequence[str] = ()
    reads: Sequence[str] = ()


@dataclass(frozen=True)
class Occurrence:
    """One place of a token: the `number` of its prompt, from 1, and its `text`, the `position` (from 0), and the token.

    `number` is that of the run's prompts, or of the texts that were looked at instead. `active` counts the slices that
    are active there; `slices` are the first of them.
    """

    number: int
    text: str
    position: int
    token: str
    active: int
    slices: Sequence[SliceActivity]


@dataclass(frozen=True)
class Heat:
    """The sum of importances at each of the `tokens` of the prompt of a `number`, from 1."""

    number: int
    tokens: Sequence[str]
    importance: Sequence[float]


@dataclass(frozen=True)
class Inspection:
    """`spd.inspect/2` but for the run's name: the first occurrences of `token` (None: of any), of so many `places` that
    it has in all, and a heat a prompt that has one of them."""

    token: str | None
    occurrences: Sequence[Occurrence]
    heat: Sequence[Heat]
    places: int | Absent = ABSENT  # of what was recorded when all were shown


@dataclass(frozen=True)
class Query:
    """What `spd inspect` asks: a token (None: every position), matrices, how many slices and labels, a threshold, and
    at how many places at most (None: at all)."""

    token: str | None
    matrices: Sequence[str] = ("*",)
    top: int = 20
    labels: int = 5
    threshold: float = 0.0
    places: int | None = None


def inspect_texts(
    subject: Subject,
    decomposition: Decomposition,
    query: Query,
    prompts: Sequence[int | str] = (),
    begin_token: bool = False,
    seed: int = 0,
    report: Report = silent,
) -> Inspection:
    """Everything `spd inspect` reports: on all of the run's own prompts, or on `prompts` (see `chosen_texts`).

    `begin_token` puts a language model's begin-of-sequence token before each text; `seed` draws the toy's own
    sequences. `report` is warned where the gates see only a projection of a text.
    """
    if any(isinstance(prompt, str) for prompt in prompts):
        warn_of_span(decomposition, report)
    own = own_texts(subject, seed)
    shown = chosen_texts(subject, own, prompts, begin_token) if prompts else own
    return inspect_slices(subject, decomposition, own, shown, query, report)


def inspect_slices(
    subject: Subject, decomposition: Decomposition, own: Texts, shown: Texts, query: Query, report: Report = silent
) -> Inspection:
    """The occurrences of a token in `shown` with their active slices, and the heat of the prompts that have it.

    A slice is unique to a prompt when it is active in no other one, of those shown and of the run's `own`. Slices are
    ordered by importance, unique ones first, then by the norm of what they write; at most `query.top` are kept.
    """
    active = ActiveSlices.on(subject, decomposition, own, shown, query, report)
    if query.token is None:
        places = [(row, position) for row, position in shown.batch.valid.nonzero().tolist()]
    else:
        places = shown.find(query.token)
    found, places = len(places), places[: query.places]
    slices = [active.slices_at(place, query.top) for place in places]
    named = iter(with_labels([one for at_place in slices for one in at_place], subject, decomposition, query.labels))
    occurrences = [
        Occurrence(
            number=shown.number(row),
            text=shown.texts[row],
            position=position,
            token=shown.pieces[row][position],
            active=active.count_at((row, position)),
            slices=[next(named) for _ in at_place],
        )
        for (row, position), at_place in zip(places, slices, strict=True)
    ]
    heat = torch.stack([g.sum(-1) for g in active.g.values()]).sum(0)  # [B, T]
    rows = sorted({row for row, _ in places})
    return Inspection(
        token=query.token,
        places=found,
        occurrences=occurrences,
        heat=[Heat(shown.number(r), shown.pieces[r], heat[r, : len(shown.pieces[r])].tolist()) for r in rows],
    )


@dataclass(frozen=True, eq=False)
class ActiveSlices:
    """Of the matrices looked at, importances `g` and inner activations `inner` `[B, T, C]`, and whether a slice is
    `unique` `[B, C]` to a prompt; slices are active above `threshold`."""

    decomposition: Decomposition
    g: Mapping[str, Tensor]
    inner: Mapping[str, Tensor]
    unique: Mapping[str, Tensor]
    threshold: float

    @classmethod
    def on(
        cls,
        subject: Subject,
        decomposition: Decomposition,
        own: Texts,
        shown: Texts,
        query: Query,
        report: Report = silent,
    ) -> ActiveSlices:
        """On the texts `shown`, beside the run's `own`."""
        g, inner = importances_of(subject, decomposition, shown.batch, report)
        names = matrices_like(list(g), query.matrices)
        unique = _unique(subject, decomposition, own, shown, g, query.threshold)
        return cls(decomposition, {name: g[name] for name in names}, inner, unique, query.threshold)

    def count_at(self, place: tuple[int, int]) -> int:
        """How many slices are active at (prompt, position)."""
        return sum(int((g[place] > self.threshold).sum()) for g in self.g.values())

    def slices_at(self, place: tuple[int, int], top: int) -> list[SliceActivity]:
        """The `top` most important active slices at (prompt, position), without labels."""
        entries: list[tuple[float, SliceActivity]] = []
        for name, g in self.g.items():
            inner = self.inner[name][place]
            written = inner.abs() * self.decomposition.of(name).V.norm(dim=1)
            for c in (g[place] > self.threshold).nonzero()[:, 0].tolist():
                alone = bool(self.unique[name][place[0], c])
                one = SliceActivity(f"{name}:{c}", g[place][c].item(), alone, inner[c].item())
                entries.append((written[c].item(), one))
        entries.sort(key=lambda entry: (-entry[1].importance, not entry[1].unique, -entry[0]))
        return [one for _, one in entries[:top]]


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


@dataclass(frozen=True)
class SliceLabels:
    """The tokens whose logits a slice raises most, `promotes`, and those that drive it most, `reads`."""

    promotes: Sequence[str]
    reads: Sequence[str]


def labels_of(subject: Subject, decomposition: Decomposition, addresses: Sequence[str], top: int) -> list[SliceLabels]:
    """The `top` tokens that each slice promotes and reads where its inner activation is positive."""
    slices = [SliceActivity(address, 1.0, False, 1.0) for address in addresses]
    return [SliceLabels(one.promotes, one.reads) for one in with_labels(slices, subject, decomposition, top)]


def with_labels(
    activities: Sequence[SliceActivity], subject: Subject, decomposition: Decomposition, top: int
) -> list[SliceActivity]:
    """The same, in order, with the `top` tokens that each slice promotes and reads.

    One product with the vocabulary a matrix, however many of its slices are shown, and wherever.
    """
    lens = TokenLens(subject.target, subject.routes, subject.token_text)
    by_matrix: dict[str, list[int]] = {}
    for number, one in enumerate(activities):
        by_matrix.setdefault(one.slice.rpartition(":")[0], []).append(number)
    labelled = list(activities)
    for name, numbers in by_matrix.items():
        slices = decomposition.of(name)
        device = slices.U.device
        index = torch.tensor([int(activities[n].slice.rpartition(":")[2]) for n in numbers], device=device)
        signs = torch.tensor([-1.0 if activities[n].activation < 0 else 1.0 for n in numbers], device=device)
        promotes = lens.promotes(name, slices.V[index], top, signs)
        reads = lens.reads(name, slices.U[:, index], top, signs)
        for number, promoted, read in zip(numbers, promotes, reads, strict=True):
            labelled[number] = replace(activities[number], promotes=promoted, reads=read)
    return labelled
