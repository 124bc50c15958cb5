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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spdcli.edits.answer_changes import (
    PLAN_BYTES,
    AnswerChange,
    compare_answers,
    with_active,
)
from spdcli.edits.choices import USUAL_OTHERS
from spdcli.edits.exam import ChangeReport, Exam
from spdcli.edits.prompts_and_answers import GROUP_TOKENS, Questions, pick, question_groups
from spdcli.edits.suppression import Address, by_matrix
from spdcli.edits.zeroing import Zeroed, silenced
from spdcli.engine.forward import Clean, clean_pass, plan_pass
from spdcli.engine.product import MaskedRows
from spdcli.engine.subcomponents import Decomposition, SliceSet
from spdcli.engine.target import Target
from spdcli.engine.variants import Piece, Variant
from spdcli.measures.importances import importances_of
from spdcli.progress import Report, counted, silent
from spdcli.runs.subject import Subject

Masks = Mapping[str, MaskedRows]


@dataclass(frozen=True)
class Masking:
    """The masks of the slices that stay: a way of `OTHERS`, with the draws and the seed of those that are sampled."""

    others: str = USUAL_OTHERS
    samples: int = 16
    seed: int = 0


USUAL_MASKING = Masking()


def draw_masks(decomposition: Decomposition, g: Mapping[str, Tensor], sequences: int, masking: Masking) -> list[Masks]:
    """The masks of the whole decomposition, nothing ablated, once a draw; `g[m]` `[B, T, C]` is not read for `on`."""
    device = decomposition.of(decomposition.names[0]).U.device
    generator = torch.Generator(device).manual_seed(masking.seed)
    rows = torch.arange(sequences, device=device)
    draws: list[Masks] = []
    for _ in range(masking.samples if masking.others == "sampled" else 1):
        masks = {}
        for name in decomposition.names:
            U = decomposition.of(name).U
            if masking.others == "on":
                mask = U.new_ones(sequences, 1, U.shape[1])
            elif masking.others == "importance":
                mask = g[name]
            else:
                assert masking.others == "sampled", masking.others
                mask = g[name] + (1 - g[name]) * torch.rand(g[name].shape, generator=generator, device=device).to(U)
            delta = mask.new_full((*mask.shape[:2], 1), float(masking.others == "on")) if decomposition.delta else None
            if delta is not None and masking.others == "sampled":
                delta = torch.rand(delta.shape, generator=generator, device=device).to(U)
            masks[name] = MaskedRows(rows, mask, delta)
        draws.append(masks)
    return draws


def without(masks: Masks, slices: Sequence[Address]) -> Masks:
    """`masks` with 0 for `slices`, at every position."""
    changed = dict(masks)
    for name, index in by_matrix(slices).items():
        mask = masks[name].mask.clone()
        mask[..., index] = 0.0
        changed[name] = MaskedRows(masks[name].rows, mask, masks[name].delta)
    return changed


@torch.no_grad()
def masked_answers(
    target: Target, slices: SliceSet, clean: Clean, masks: Sequence[Masks], zeroed: Sequence[Zeroed]
) -> Tensor:
    """Next-token log-probabilities `[n, N]`, float64: the log of the mean distribution over the draws in `masks`.

    Of an answer of several tokens the mean is taken for each, given those before it.
    """
    draws = []
    for draw in masks:
        touched = [target.matrices[name].block for name in draw] + [one.matrix.block for one in zeroed]
        if not touched:
            draws.append(clean.log_probs.double())
            continue
        whole = Piece(Variant("", "importance", frozenset(draw), min(touched), 1.0), 0, len(clean.batch.tokens))
        with silenced(zeroed):
            hidden = plan_pass(target, slices, clean, [whole], draw)
        draws.append(target.log_probabilities(hidden[clean.batch.looked]))
    return torch.stack(draws).logsumexp(0) - math.log(len(draws))


Cut = tuple[Sequence[Address], Sequence[Zeroed]]  # what is taken away at once


@dataclass(frozen=True, kw_only=True)
class AblationReport(ChangeReport):
    """What the loss of slices, or of `zeroed` matrices and MLP layers, does (`spd.suppress/1` of `spd ablate`).

    Without slices it is the target that loses `zeroed`; else the decomposed model, whose `others` keep their masks.
    """

    zeroed: list[str]
    others: str | None


def ablate(
    subject: Subject,
    decomposition: Decomposition,
    exam: Exam,
    slices: Sequence[Address] = (),
    zeroed: Sequence[Zeroed] = (),
    masking: Masking = USUAL_MASKING,
    report: Report = silent,
) -> AblationReport:
    """The effects of taking `slices` and `zeroed` away together, and `alone` of each one, if there are several.

    Without slices it is the target that loses `zeroed`; else the decomposed model. `before` is that model with nothing
    taken away, `target` the target's own probability and `kl_target` KL(target ‖ after). All draws are shared. Facts
    are measured for all that is taken away together.
    """
    cuts: dict[str, Cut] = {"": (slices, zeroed)}
    if len(slices) + len(zeroed) > 1:
        cuts |= {str(address): ([address], ()) for address in slices} | {one.label: ((), [one]) for one in zeroed}
    alone = measure_cuts(subject, decomposition, exam.questions, cuts, masking, report)
    effects = alone.pop("")
    if slices:
        effects = with_active(subject, decomposition, exam.questions, slices, effects)
    facts = None
    if exam.facts is not None:
        on_facts = ablate_many(subject, decomposition, exam.facts.questions, cuts[""], masking, report)
        effects, facts = effects + exam.facts.marked(on_facts), exam.facts.summary(on_facts, exam.seed)
    return AblationReport(
        slices=[str(address) for address in slices],
        zeroed=[one.label for one in zeroed],
        others=masking.others if slices else None,
        effects=effects,
        alone=alone,
        facts=facts,
    )


@torch.no_grad()
def ablate_many(
    subject: Subject,
    decomposition: Decomposition,
    questions: Questions,
    cut: Cut,
    masking: Masking = USUAL_MASKING,
    report: Report = silent,
) -> list[AnswerChange]:
    """The effects of one cut on many questions, in groups that bound the memory of their masks."""
    slices = sum(decomposition.of(name).U.shape[1] for name in decomposition.names)
    draws = masking.samples if masking.others == "sampled" else 1
    held = decomposition.of(decomposition.names[0]).U.element_size() * slices * draws
    effects: dict[int, AnswerChange] = {}
    groups = list(question_groups(questions.batch, min(GROUP_TOKENS, PLAN_BYTES // held)))
    for rows, batch in counted(groups, f"groups of {questions.group}s", report):
        numbers = rows.tolist()
        part = replace(pick(questions, numbers), batch=batch)
        group = measure_cuts(subject, decomposition, part, {"": cut}, masking)[""]
        effects |= zip(numbers, group, strict=True)
    return [effects[row] for row in range(len(questions.texts))]


@torch.no_grad()
def measure_cuts(
    subject: Subject,
    decomposition: Decomposition,
    questions: Questions,
    cuts: Mapping[str, Cut],
    masking: Masking = USUAL_MASKING,
    report: Report = silent,
) -> dict[str, list[AnswerChange]]:
    """The effects of every cut by name, each on the same model and the same draws (see `ablate`)."""
    target, others = subject.target, masking.others
    clean = clean_pass(target, questions.batch, ())
    slices = [address for addresses, _ in cuts.values() for address in addresses]
    masks: list[Masks] = [{}]
    if slices:
        g = importances_of(subject, decomposition, questions.batch)[0] if others != "on" else {}
        masks = draw_masks(decomposition, g, len(clean.batch.tokens), masking)
        if others == "on" and decomposition.delta:  # matrices that lose nothing are the target's own, exactly
            masks = [{name: one[name] for name in by_matrix(slices)} for one in masks]
    exact = not slices or (others == "on" and decomposition.delta)
    log_p = clean.log_probs.double()
    before = log_p if exact else masked_answers(target, decomposition, clean, masks, ())

    def effects(addresses: Sequence[Address], off: Sequence[Zeroed]) -> list[AnswerChange]:
        cut = [without(one, addresses) for one in masks]
        after = masked_answers(target, decomposition, clean, cut, off)
        rows, original = compare_answers(questions, before, after), compare_answers(questions, log_p, after)
        return [replace(row, target=own.before, kl_target=own.kl) for row, own in zip(rows, original, strict=True)]

    named = counted(list(cuts.items()), "taking away", report)
    return {name: effects(*cut) for name, cut in named}
