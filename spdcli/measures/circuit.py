"""How the induction circuit works, in the target and in its slices (section 6.1).

    attention   m attends to s1, then s2 to m; the first with and without position encodings before the query
    offsets     which slice of K0 aligns token n with position n + 1: `circuit_offsets.py`
    identity    how many directions of V1 it takes to tell the tokens apart: `circuit_identity.py`
    importance  where the gates turn slices on, by position class and by distance from s1
    needs       where the target needs each matrix: `circuit_needs.py`
    controls    what is left of it when the gates know less: `gate_knowledge.py`

Letters: B sequences, T positions, D width, C slices, N vocabulary. Everything here is about the paper's toy:
two layers of one head each, attention alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spdcli.engine.subcomponents import Decomposition
from spdcli.measures.circuit_data import REACH, SEQUENCES, CircuitData, circuit_data
from spdcli.measures.circuit_identity import Identity, identity
from spdcli.measures.circuit_needs import needs
from spdcli.measures.circuit_offsets import Offsets, offset_profiles
from spdcli.measures.gate_knowledge import Control, gate_controls
from spdcli.measures.target_and_masked import TargetAndMasked, patterns_of
from spdcli.runs.subject import Subject
from spdcli.targets.sequences import POSITION_CLASSES


@dataclass(frozen=True)
class CircuitAttention:
    """Mean attention probabilities of the circuit's two steps.

    `m_to_s1` with everything; then without the position encodings in m's query
    (`m_to_s1_unplaced_query`, the paper's 1.0 to 0.0941), also without them on s1's key
    (`m_to_s1_unplaced_query_and_s1`), and without them on any key (`m_to_s1_content_only`). `s2_to_m` is the second
    step's.
    """

    m_to_s1: float
    m_to_s1_unplaced_query: float
    m_to_s1_unplaced_query_and_s1: float
    m_to_s1_content_only: float
    s2_to_m: float


@dataclass(frozen=True)
class ImportanceProfile:
    """Importances of each matrix, summed over slices: a mean by position class (`classes`), and one at each of
    `distances` from s1, in positions (`by_distance`, s2 left out)."""

    distances: Sequence[int]
    classes: Mapping[str, Mapping[str, float]]
    by_distance: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Circuit:
    """The mechanism as numbers, on so many fresh `sequences`: `circuit` in `spd.eval/2`.

    `offsets` is None unless Q0 and K0 are decomposed, `identity` unless V1 is. `needs` by matrix and position class are
    KLs in nats, `controls` is by name of the control.
    """

    sequences: int
    attention: TargetAndMasked[CircuitAttention]
    offsets: Offsets | None
    identity: Identity | None
    importance: ImportanceProfile
    needs: Mapping[str, Mapping[str, float]]
    controls: Mapping[str, Control]


@dataclass(frozen=True, eq=False)
class CircuitExample:
    """One sequence to draw: its `tokens`, where s1, m and s2 stand (`at`), and attention probabilities `[T, T]` of both
    layers, as arrays, in the `target` and in the model of active slices alone (`masked`)."""

    tokens: Sequence[int]
    at: Mapping[str, int]
    target: Sequence[Any]
    masked: Sequence[Any]


@torch.no_grad()
def circuit_of(subject: Subject, decomposition: Decomposition, threshold: float, seed: int) -> Circuit:
    """The circuit of a subject that `has_circuit`, on SEQUENCES fresh sequences; active is above `threshold`."""
    return measure_circuit(circuit_data(subject, decomposition, SEQUENCES, threshold, seed), seed)


@torch.no_grad()
def circuit_example(subject: Subject, decomposition: Decomposition, threshold: float, seed: int) -> CircuitExample:
    """One of the sequences that `circuit_of` measures."""
    return example(circuit_data(subject, decomposition, SEQUENCES, threshold, seed))


@torch.no_grad()
def measure_circuit(data: CircuitData, seed: int) -> Circuit:
    """Everything about the circuit on `data`; `seed` draws what the controls of the gates need."""
    decomposed = data.decomposition.names
    return Circuit(
        sequences=len(data.rows),
        attention=TargetAndMasked(circuit_attention(data, masked=False), circuit_attention(data, masked=True)),
        offsets=offset_profiles(data) if {"Q0", "K0"} <= set(decomposed) else None,
        identity=identity(data) if "V1" in decomposed else None,
        importance=importance_profile(data),
        needs=needs(data),
        controls=gate_controls(data, seed),
    )


def circuit_attention(data: CircuitData, masked: bool) -> CircuitAttention:
    """Attention in the target or, `masked`, in the model of active slices alone.

    Where encodings are left out, the masks stay those of the unchanged sequence.
    """
    at, rows = data.at, data.rows
    but_s1 = (~data.clean.batch.classes["s1"])[..., None].to(data.toy.positions)

    def to_s1(query: float, key: Tensor | float) -> float:
        q, k = data.first_projection("Q0", query, masked), data.first_projection("K0", key, masked)
        pattern = data.block(0).scores(q, k).log_softmax(-1)
        return pattern[rows, 0, at["m"], at["s1"]].exp().mean().item()

    patterns = patterns_of(data.target, data.decomposition, data.clean, data.g)
    second = (patterns.masked if masked else patterns.target)[1]
    return CircuitAttention(
        m_to_s1=to_s1(1.0, 1.0),
        m_to_s1_unplaced_query=to_s1(0.0, 1.0),
        m_to_s1_unplaced_query_and_s1=to_s1(0.0, but_s1),
        m_to_s1_content_only=to_s1(0.0, 0.0),
        s2_to_m=second[rows, 0, at["s2"], at["m"]].exp().mean().item(),
    )


def importance_profile(data: CircuitData) -> ImportanceProfile:
    """Where the gates turn each matrix's slices on."""
    classes, length = data.clean.batch.classes, data.clean.batch.tokens.shape[1]
    distances = list(range(max(-REACH, 3 - length), min(REACH, length - 2) + 1))  # s1 stands at T - 3 at the latest
    place = torch.arange(length, device=data.rows.device) - data.at["s1"][:, None]  # [B, T]
    inner = ~classes["s2"]
    totals = {name: g.sum(-1) for name, g in data.g.items()}  # [B, T] each
    return ImportanceProfile(
        distances=distances,
        classes={
            name: {kind: total[classes[kind]].mean().item() for kind in POSITION_CLASSES}
            for name, total in totals.items()
        },
        by_distance={
            name: [total[inner & (place == distance)].mean().item() for distance in distances]
            for name, total in totals.items()
        },
    )


@torch.no_grad()
def example(data: CircuitData) -> CircuitExample:
    """The sequence of `data` whose s1 stands nearest to the middle."""
    length = data.clean.batch.tokens.shape[1]
    row = int((data.at["s1"] - length // 2).abs().argmin())
    patterns = patterns_of(data.target, data.decomposition, data.clean, data.g)
    return CircuitExample(
        tokens=data.clean.batch.tokens[row].tolist(),
        at={kind: int(places[row]) for kind, places in data.at.items()},
        target=[pattern[row, 0].exp().cpu().numpy() for pattern in patterns.target],
        masked=[pattern[row, 0].exp().cpu().numpy() for pattern in patterns.masked],
    )
