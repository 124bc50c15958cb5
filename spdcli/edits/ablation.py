"""Ablation: the decomposed model without some of its slices, or the target without whole matrices or MLP layers.

Suppression (`suppression.py`) edits the target; ablation runs the decomposition, with the slices' masks at 0 and the
others

    on           at 1, the delta too where the run has one: the target minus the slices
    importance   at their importance g, the delta off: the model made of active slices
    sampled      drawn from U(g, 1), the delta from U(0, 1), as in training; distributions are means over draws

B questions, T positions, C slices of a matrix, N vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spdcli.edits.answer_changes import (
    GROUP_TOKENS,
    PLAN_BYTES,
    AnswerChange,
    Questions,
    compare_answers,
    divergence,
    log_probabilities,
    question_groups,
)
from spdcli.edits.choices import USUAL_OTHERS
from spdcli.edits.suppression import Address, by_matrix, find_matrix
from spdcli.engine.forward import Clean, clean_pass, plan_pass
from spdcli.engine.product import MaskedRows
from spdcli.engine.subcomponents import Decomposition, SliceSet
from spdcli.engine.target import Matrix, Target
from spdcli.engine.variants import Piece, Variant
from spdcli.errors import UsageError
from spdcli.measures.importances import importances_of
from spdcli.runs.subject import Subject

MLP_MATRICES = ("mlp.", "Down")  # how the matrices of an MLP are named below their block; the last of them ends it
Masks = Mapping[str, MaskedRows]


@dataclass(frozen=True, eq=False)
class Zeroed:
    """A matrix whose weight is 0, so that its bias alone is left; with `output` the bias is gone too."""

    label: str
    matrix: Matrix
    output: bool


def zeroed_matrix(target: Target, name: str) -> Zeroed:
    """A whole matrix of the target, decomposed or not. UsageError, naming the nearest, where it has none such."""
    return Zeroed(name, target.matrices[find_matrix(list(target.matrices), name, "the target has")], output=False)


def zeroed_mlp(target: Target, layer: int) -> Zeroed:
    """A whole MLP layer: nothing of it reaches the residual stream (Figure 9)."""
    if not 0 <= layer < len(target.blocks):
        raise UsageError(f"--mlp {layer}: the target has the layers 0 to {len(target.blocks) - 1}")
    own = [matrix for matrix in target.matrices.values() if matrix.block == layer and _is_mlp(matrix.name)]
    if not own:
        raise UsageError(f"--mlp {layer}: this target has no MLP")
    return Zeroed(f"mlp {layer}", own[-1], output=True)


def _is_mlp(name: str) -> bool:
    return any(name.startswith(start) or f".{start}" in name for start in MLP_MATRICES)


@contextmanager
def silenced(zeroed: Sequence[Zeroed]) -> Iterator[None]:
    """While open, the matrices in `zeroed` write nothing, in whatever forward pass the target makes."""

    def hook_of(one: Zeroed) -> Any:
        start, stop = one.matrix.columns
        left = None if one.output else one.matrix.bias

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[..., start:stop] = 0.0 if left is None else left
            return changed

        return hook

    handles = []
    try:
        for one in zeroed:
            handles.append(one.matrix.module.register_forward_hook(hook_of(one)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def draw_masks(
    decomposition: Decomposition, g: Mapping[str, Tensor], others: str, sequences: int, samples: int, seed: int
) -> list[Masks]:
    """The masks of the whole decomposition, nothing ablated, once a draw; `g[m]` `[B, T, C]` is not read for `on`."""
    device = decomposition.of(decomposition.names[0]).U.device
    generator = torch.Generator(device).manual_seed(seed)
    drawn: list[Masks] = []
    for _ in range(samples if others == "sampled" else 1):
        masks = {}
        for name in decomposition.names:
            rows = torch.arange(sequences, device=device)
            U = decomposition.of(name).U
            if others == "on":
                mask = U.new_ones(sequences, 1, U.shape[1])
            elif others == "importance":
                mask = g[name]
            else:
                mask = g[name] + (1 - g[name]) * torch.rand(g[name].shape, generator=generator, device=device).to(U)
            delta = mask.new_full((*mask.shape[:2], 1), float(others == "on")) if decomposition.delta else None
            if delta is not None and others == "sampled":
                delta = torch.rand(delta.shape, generator=generator, device=device).to(U)
            masks[name] = MaskedRows(rows, mask, delta)
        drawn.append(masks)
    return drawn


def without(masks: Masks, removed: Sequence[Address]) -> Masks:
    """`masks` with 0 for the slices in `removed`, at every position."""
    changed = dict(masks)
    for name, index in by_matrix(removed).items():
        mask = masks[name].mask.clone()
        mask[..., index] = 0.0
        changed[name] = MaskedRows(masks[name].rows, mask, masks[name].delta)
    return changed


@torch.no_grad()
def masked_answers(
    target: Target, slices: SliceSet, clean: Clean, masks: Sequence[Masks], zeroed: Sequence[Zeroed]
) -> Tensor:
    """Next-token log-probabilities `[B, N]`, float64: the log of the mean distribution over the draws in `masks`."""
    draws = []
    for asked in masks:
        touched = [target.matrices[name].block for name in asked] + [one.matrix.block for one in zeroed]
        if not touched:
            draws.append(clean.log_probs.double())
            continue
        whole = Piece(Variant("", "importance", frozenset(asked), min(touched), 1.0), 0, len(clean.batch.tokens))
        with silenced(zeroed):
            hidden = plan_pass(target, slices, clean, [whole], asked)
        draws.append(log_probabilities(target, hidden[clean.batch.looked]))
    return torch.stack(draws).logsumexp(0) - math.log(len(draws))


Cut = tuple[Sequence[Address], Sequence[Zeroed]]  # what is taken away at once


@torch.no_grad()
def ablate(
    subject: Subject,
    decomposition: Decomposition,
    questions: Questions,
    slices: Sequence[Address],
    zeroed: Sequence[Zeroed] = (),
    others: str = USUAL_OTHERS,
    samples: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """The effects of taking `slices` and `zeroed` away together, and `alone` of each one, if there are several.

    Without slices it is the target that loses `zeroed`; else the decomposed model. `before` is that model with nothing
    taken away, `target` the target's own probability and `kl_target` KL(target ‖ after). All draws are shared.
    """
    cuts: dict[str, Cut] = {"": (slices, zeroed)}
    if len(slices) + len(zeroed) > 1:
        cuts |= {str(address): ([address], ()) for address in slices} | {one.label: ((), [one]) for one in zeroed}
    measured = measure_cuts(subject, decomposition, questions, cuts, others, samples, seed)
    return {"effects": measured.pop(""), "alone": measured}


@torch.no_grad()
def ablate_facts(
    subject: Subject,
    decomposition: Decomposition,
    questions: Questions,
    cut: Cut,
    others: str = USUAL_OTHERS,
    samples: int = 16,
    seed: int = 0,
) -> list[AnswerChange]:
    """The effects of one cut on many questions, in groups that bound the memory of their masks."""
    slices = sum(decomposition.of(name).U.shape[1] for name in decomposition.names)
    held = decomposition.of(decomposition.names[0]).U.element_size() * slices * (samples if others == "sampled" else 1)
    effects: list[AnswerChange | None] = [None] * len(questions.texts)
    for rows, batch in question_groups(questions.batch, min(GROUP_TOKENS, PLAN_BYTES // held)):
        numbers = rows.tolist()
        texts, tokens = ([column[row] for row in numbers] for column in (questions.texts, questions.tokens))
        part = Questions(batch, texts, tokens, questions.group)
        measured = measure_cuts(subject, decomposition, part, {"": cut}, others, samples, seed)[""]
        for row, effect in zip(numbers, measured, strict=True):
            effects[row] = effect
    return [effect for effect in effects if effect is not None]


def measure_cuts(
    subject: Subject,
    decomposition: Decomposition,
    questions: Questions,
    cuts: Mapping[str, Cut],
    others: str,
    samples: int,
    seed: int,
) -> dict[str, list[AnswerChange]]:
    """The effects of every cut by name, each on the same model and the same draws (see `ablate`)."""
    target = subject.target
    clean = clean_pass(target, questions.batch, ())
    slices = [address for removed, _ in cuts.values() for address in removed]
    masks: list[Masks] = [{}]
    if slices:
        g = importances_of(subject, decomposition, questions.batch)[0] if others != "on" else {}
        masks = draw_masks(decomposition, g, others, len(clean.batch.tokens), samples, seed)
        if others == "on" and decomposition.delta:  # matrices that lose nothing are the target's own, exactly
            masks = [{name: one[name] for name in by_matrix(slices)} for one in masks]
    exact = not slices or (others == "on" and decomposition.delta)
    log_p = clean.log_probs.double()
    before = log_p if exact else masked_answers(target, decomposition, clean, masks, ())
    answers = questions.batch.answers
    assert answers is not None
    original = log_p.gather(1, answers[:, None]).exp()[:, 0].tolist()

    def effects(removed: Sequence[Address], off: Sequence[Zeroed]) -> list[AnswerChange]:
        cut = [without(one, removed) for one in masks]
        after = masked_answers(target, decomposition, clean, cut, off)
        far = divergence(log_p, after).tolist()
        rows = compare_answers(questions, before, after)
        return [replace(row, target=p, kl_target=kl) for row, p, kl in zip(rows, original, far, strict=True)]

    return {name: effects(*cut) for name, cut in cuts.items()}
