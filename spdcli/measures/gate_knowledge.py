"""Who knows which position is m, the slices or the gates? Take the gates' knowledge away and see what is left.

    own              the importances as they are
    no_context       every position's gates from its own input and absolute position, blind to the sequence
    other_sequences  importances of another sequence at the same position
    other_positions  importances of the same sequence at another position, shifted around its ring
    always_on        no gates: every slice that is active anywhere is on everywhere

Where the model of active slices alone still works without a kind of knowledge, the circuit did not need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spdcli.engine.forward import masked_logits
from spdcli.engine.importance import AttentionMixer
from spdcli.engine.masks import importance_masks
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import log_probabilities
from spdcli.measures.circuit_data import CircuitData
from spdcli.targets.induction import recorded_patterns
from spdcli.targets.sequences import POSITION_CLASSES


@dataclass(frozen=True)
class Performance:
    """How a masked toy does: the share of sequences answered right, KL(target ‖ masked) at s2 in nats, and the mean
    attention probabilities of the circuit's two steps."""

    accuracy: float
    kl: float
    m_to_s1: float
    s2_to_m: float


@dataclass(frozen=True)
class Control:
    """What is left under one control: with `all` matrices' importances replaced, with those of one of the `layers` in
    order, and with those of one of the `matrices`, while the others keep theirs.

    `own` has nothing to replace: there is only `all`. `importance` by matrix and position class is the mean of the
    replaced importances, summed over slices.
    """

    all: Performance
    layers: Sequence[Performance]
    matrices: Mapping[str, Performance]
    importance: Mapping[str, Mapping[str, float]]


@contextmanager
def blind_gates(decomposition: Decomposition) -> Iterator[None]:
    """While open, the importance attention sees the query's own position alone.

    Softmax over one key is 1, so that line 4 of Algorithm 1 becomes the position's own value. Gates without
    attention see no context anyway, and stay as they are.
    """

    def alone(mixer: nn.Module, args: tuple[Tensor, ...], mixed: Tensor) -> Tensor:
        assert isinstance(mixer, AttentionMixer)
        placed = args[0] + mixer.absolute[:, :, : args[0].shape[2]]
        return torch.cat([placed @ mixer.v, placed], dim=-1)

    handles = [mixer.register_forward_hook(alone) for mixer in decomposition.importances.mixers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_context(data: CircuitData) -> dict[str, Tensor]:
    """Importances `[B, T, C]` a matrix from each position's own input."""
    inputs = {name: data.clean.inputs[name] for name in data.decomposition.names}
    if data.decomposition.importances.joint is not None:  # a sequence of its own for every position
        shape = data.clean.batch.tokens.shape
        alone = {name: x.flatten(0, 1)[:, None] for name, x in inputs.items()}
        return {name: g.unflatten(0, shape)[:, :, 0] for name, g in data.decomposition.importance(alone)[0].items()}
    with blind_gates(data.decomposition):
        return data.decomposition.importance(inputs)[0]


def from_other_sequences(data: CircuitData, generator: torch.Generator) -> dict[str, Tensor]:
    """Every sequence gets the importances of its neighbour: the sequences were drawn independently."""
    return {name: g.roll(1, 0) for name, g in data.g.items()}


def from_other_positions(data: CircuitData, generator: torch.Generator) -> dict[str, Tensor]:
    """Every sequence's importances move on by 1 .. T-1 positions, drawn once a sequence, round its end."""
    count, length = data.clean.batch.tokens.shape
    shift = torch.randint(1, length, (count, 1), generator=generator)
    source = ((torch.arange(length) - shift) % length).to(data.rows.device)
    return {name: g[data.rows[:, None], source] for name, g in data.g.items()}


def always_on(data: CircuitData) -> dict[str, Tensor]:
    """1 for every slice that is active somewhere, at every position; 0 for the others."""
    masks = {name: torch.zeros_like(g) for name, g in data.g.items()}
    for name, mask in masks.items():
        mask[..., data.active[name]] = 1.0
    return masks


CONTROLS: dict[str, Callable[[CircuitData, torch.Generator], Mapping[str, Tensor]]] = {
    "own": lambda data, generator: data.g,
    "no_context": lambda data, generator: without_context(data),
    "other_sequences": from_other_sequences,
    "other_positions": from_other_positions,
    "always_on": lambda data, generator: always_on(data),
}


@torch.no_grad()
def gate_controls(data: CircuitData, seed: int) -> dict[str, Control]:
    """What the model of active slices alone does under every control; `seed` draws what they need."""
    generator = torch.Generator().manual_seed(seed)
    controls = {}
    for control, change in CONTROLS.items():
        importances = change(data, generator)
        names = [] if control == "own" else list(data.g)
        layers = [[name for name in names if data.target.matrices[name].block == layer] for layer in range(2)]
        controls[control] = Control(
            all=performance(data, importances),
            layers=[performance(data, data.g | {n: importances[n] for n in group}) for group in layers if group],
            matrices={name: performance(data, data.g | {name: importances[name]}) for name in names},
            importance={
                name: {kind: g.sum(-1)[data.clean.batch.classes[kind]].mean().item() for kind in POSITION_CLASSES}
                for name, g in importances.items()
            },
        )
    return controls


def performance(data: CircuitData, g: Mapping[str, Tensor]) -> Performance:
    """How the model with masks `g[m]` `[B, T, C]` answers, and how strongly its circuit attends."""
    masks = importance_masks(g, data.decomposition.delta)
    with recorded_patterns(data.toy) as patterns:
        if all(data.target.matrices[name].block > 0 for name in g):  # the first block is not run again below
            data.target.run(data.clean.batch.tokens)
            patterns.pop()
        log_q = log_probabilities(masked_logits(data.target, data.decomposition, data.clean, masks))
    log_p, answers = data.clean.log_probs, data.clean.batch.answers
    assert answers is not None
    rows, at = data.rows, data.at
    return Performance(
        accuracy=log_q.argmax(-1).eq(answers).float().mean().item(),
        kl=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        m_to_s1=patterns[0][rows, 0, at["m"], at["s1"]].exp().mean().item(),
        s2_to_m=patterns[1][rows, 0, at["s2"], at["m"]].exp().mean().item(),
    )
