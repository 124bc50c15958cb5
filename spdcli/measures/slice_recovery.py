"""How well a decomposition finds the slices of a planted target, against what is known of them.

Slices are compared as the data sees them, by what they write when they read the inputs X `[n, I]` of their matrix:
|cos(Xu (x) v, Xu' (x) v')|. What a slice would read in directions where no input ever lies is nobody's choice: slices
that are never on make up for any of it, so that U V is W again. Active slices and planted ones are assigned to each
other one to one, so that the sum of these cosines is largest; a pair whose cosine is at least MATCHED is a match. Then,
of one matrix or of all together,

    precision   matches, of the slices that are active anywhere
    recall      matches, of the planted slices
    cosine      mean over planted slices of the cosine with their partner, 0 for one that has none
    weights     the same of |cos(u (x) v, u' (x) v')|, whatever the data sees
    missing     positions at which a planted slice is needed and its partner is not active, of those that need one
    idle        positions at which a slice is active and its partner is not needed, of those at which one is active

T positions, C slices, P planted slices of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.subcomponents import Decomposition, Slices, SliceSet
from spdcli.measures.evaluation_data import EVALUATION_SEED
from spdcli.measures.slice_similarity import match, weight_signature
from spdcli.runs.settings import SEQUENCES_AT_ONCE
from spdcli.runs.subject import Subject

MATCHED = 0.95


@dataclass(frozen=True, kw_only=True)
class SliceRecovery:
    """How well the `planted` slices of a matrix, or of all of them, are found; definitions in the module's docstring.

    `active` are the slices that are active at any position looked at, `matches` the pairs of them. `read` and `write`
    are the mean |cos| of Xu and of v alone. `missing` and `idle` are None where nothing says when slices are active.
    """

    planted: int
    active: int
    matches: int
    precision: float
    recall: float
    cosine: float
    weights: float
    read: float
    write: float
    missing: float | None
    idle: float | None


@dataclass(frozen=True)
class Recovery:
    """Of all matrices together, and matrix by matrix."""

    total: SliceRecovery
    matrices: Mapping[str, SliceRecovery]


@dataclass(frozen=True)
class Activity:
    """On how many positions each slice c of a matrix is active `[C]`, each planted slice p is needed `[P]`, and both
    `[C, P]`."""

    active: Tensor
    needed: Tensor
    both: Tensor

    @classmethod
    def of(cls, active: Tensor, needed: Tensor) -> Activity:
        """Counted over `active` `[B, T, C]` and `needed` `[B, T, P]`, both bool."""
        on, wanted = active.flatten(0, 1).double(), needed.flatten(0, 1).double()
        return cls(on.sum(0).cpu(), wanted.sum(0).cpu(), (on.t() @ wanted).cpu())

    def __add__(self, other: Activity) -> Activity:
        return Activity(self.active + other.active, self.needed + other.needed, self.both + other.both)


@dataclass
class _Counts:
    """Sums from which a `SliceRecovery` is made; lists have an entry a planted slice."""

    cosines: list[float]
    weights: list[float]
    reads: list[float]
    writes: list[float]
    active: int
    activity: tuple[float, float, float] | None  # positions active, needed, and both with their partners

    def __add__(self, other: _Counts) -> _Counts:
        both = None
        if self.activity is not None and other.activity is not None:
            both = tuple(a + b for a, b in zip(self.activity, other.activity, strict=True))
        return _Counts(
            self.cosines + other.cosines,
            self.weights + other.weights,
            self.reads + other.reads,
            self.writes + other.writes,
            self.active + other.active,
            both,  # type: ignore[arg-type]
        )

    def summary(self) -> SliceRecovery:
        planted, matches = len(self.cosines), sum(cosine >= MATCHED for cosine in self.cosines)
        missing = idle = None
        if self.activity is not None:
            active, needed, both = self.activity
            missing, idle = 1 - both / max(needed, 1), (active - both) / max(active, 1)
        return SliceRecovery(
            planted=planted,
            active=self.active,
            matches=matches,
            precision=matches / max(self.active, 1),
            recall=matches / planted,
            cosine=sum(self.cosines) / planted,
            weights=sum(self.weights) / planted,
            read=sum(self.reads) / planted,
            write=sum(self.writes) / planted,
            missing=missing,
            idle=idle,
        )


@torch.no_grad()
def slice_recovery(
    subject: Subject, decomposition: Decomposition, sequences: int, threshold: float, seed: int
) -> Recovery:
    """How well a decomposition finds the slices of its planted target, on so many fresh sequences.

    A slice is active where its importance is above `threshold`.
    """

    def active(clean: Clean) -> dict[str, Tensor]:
        g, _ = decomposition.importance(clean.inputs, clean.padding)
        return {name: values > threshold for name, values in g.items()}

    return recovery_where(subject, decomposition, active, sequences, seed)


@torch.no_grad()
def recovery_where(
    subject: Subject, slices: SliceSet, active: Callable[[Clean], dict[str, Tensor]], sequences: int, seed: int
) -> Recovery:
    """How well `slices` are the planted ones, active where `active` says so of a batch, `[B, T, C]` a matrix."""
    data = recovery_data(subject, slices.names, active, sequences, seed)
    somewhere = {name: (one.active > 0).nonzero()[:, 0].tolist() for name, one in data.activity.items()}
    return compared(subject, {name: slices.of(name) for name in slices.names}, somewhere, data.factors, data.activity)


@dataclass(frozen=True, eq=False)
class RecoveryData:
    """Where slices are active and planted ones needed, and a factor `[I, I]` of each matrix's inputs X: the norm of
    `factor @ u` is that of `X u`."""

    activity: Mapping[str, Activity]
    factors: Mapping[str, Tensor]


def recovery_data(
    subject: Subject,
    names: Sequence[str],
    active: Callable[[Clean], dict[str, Tensor]] | None,
    sequences: int,
    seed: int,
) -> RecoveryData:
    """Counted on fresh sequences, never those of training; no activity without `active`, which tells it of a batch."""
    planted = subject.planted
    assert planted is not None
    generator = torch.Generator().manual_seed(EVALUATION_SEED + seed)
    activity, factors = dict[str, Activity](), dict[str, Tensor]()
    for start in range(0, sequences, SEQUENCES_AT_ONCE):
        batch = planted.draw(min(SEQUENCES_AT_ONCE, sequences - start), generator).to(subject.target.device)
        clean, needed = clean_pass(subject.target, batch, names), planted.needed(batch)
        for name, on in (active(clean) if active else {}).items():
            counts = Activity.of(on, needed[name])
            activity[name] = counts + activity[name] if name in activity else counts
        for name in names:
            inputs = clean.inputs[name].flatten(0, 1).double()
            stacked = torch.cat([factors[name], inputs]) if name in factors else inputs
            factors[name] = torch.linalg.qr(stacked, mode="r").R
    return RecoveryData(activity, factors)


@torch.no_grad()
def compared(
    subject: Subject,
    slices: Mapping[str, Slices],
    active: Mapping[str, Sequence[int]],
    factors: Mapping[str, Tensor],
    activity: Mapping[str, Activity] | None = None,
) -> Recovery:
    """The `active` slices (their numbers, by matrix) beside the planted ones; without `activity` no positions."""
    assert subject.planted is not None
    counts = {}
    for name, factor in factors.items():
        where = None if activity is None else activity[name]
        counts[name] = _counts(slices[name], active[name], subject.planted.slices[name], factor, where)
    total = _Counts([], [], [], [], 0, (0.0, 0.0, 0.0))
    for one in counts.values():
        total = total + one
    return Recovery(total.summary(), {name: one.summary() for name, one in counts.items()})


def _counts(
    slices: Slices, active: Sequence[int], planted: Slices, factor: Tensor, activity: Activity | None
) -> _Counts:
    """One matrix."""
    every = range(planted.U.shape[1])
    partners = match(weight_signature(_seen(planted, factor), every), weight_signature(_seen(slices, factor), active))
    sums = _Counts([], [], [], [], len(active), None)
    both = 0.0
    for own in every:
        partner, cosine = partners.get(own, (0, 0.0))
        there = 1.0 if own in partners else 0.0
        write = _cosine(slices.V[partner], planted.V[own])
        sums.cosines.append(cosine)
        sums.weights.append(there * write * _cosine(slices.U[:, partner], planted.U[:, own]))
        sums.reads.append(there * cosine / max(write, 1e-12))
        sums.writes.append(there * write)
        if activity is not None and own in partners:
            both += float(activity.both[partner, own])
    if activity is not None:
        sums.activity = (float(activity.active.sum()), float(activity.needed.sum()), both)
    return sums


def _seen(slices: Slices, factor: Tensor) -> Slices:
    """Slices whose U are the inner activations of the data, up to a rotation of its positions."""
    return Slices(factor @ slices.U.double(), slices.V.double())


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(cosine_similarity(one.double(), other.double().to(one.device), dim=0).abs())
