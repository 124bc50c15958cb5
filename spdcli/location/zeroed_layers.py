"""Whole MLP layers that write nothing, one after the other (Figure 9): which one an answer needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spdcli.edits.ablation import Cut, ablate_many, measure_cuts
from spdcli.edits.answer_changes import AnswerChanges
from spdcli.edits.zeroing import zeroed_mlp
from spdcli.location.fact_context import FactContext

HALVED = 0.5  # of another prompt's answer: a layer that costs more destroys the model


@dataclass(frozen=True, eq=False)
class ZeroedLayers:
    """What each zeroed MLP layer does: to the run's `prompts` by its label, `mlp N`, and to the known `facts` by its
    number where that was measured; `needed` is, by prompt, the layer other than 0 that the answer needs most."""

    prompts: Mapping[str, AnswerChanges]
    facts: Mapping[int, AnswerChanges]
    needed: list[int]


def zeroed_layers(context: FactContext) -> ZeroedLayers:
    """Every MLP layer on the prompts; layer 0, and each prompt's most needed other one, on the known facts too."""
    every = [zeroed_mlp(context.target, layer) for layer in range(len(context.target.blocks))]
    run = (context.subject, context.decomposition)
    cuts: dict[str, Cut] = {one.label: ((), [one]) for one in every}
    alone = measure_cuts(*run, context.prompts, cuts)
    needed = [most_needed(row, list(alone.values())) for row in range(len(context.prompts.texts))]
    if context.known is None:
        return ZeroedLayers(alone, {}, needed)
    questions = context.known.questions
    layers = sorted({0, *needed})
    return ZeroedLayers(alone, {n: ablate_many(*run, questions, ((), [every[n]])) for n in layers}, needed)


def most_needed(row: int, by_layer: Sequence[AnswerChanges]) -> int:
    """The layer other than 0 that lowers the answer of prompt `row` most, without halving that of another prompt.

    A layer that does destroys the model and tells no fact's place, as layer 0 does; where all are so, all count.
    """
    later = range(1, len(by_layer))

    def spares(layer: int) -> bool:
        return all(change.ratio > HALVED for other, change in enumerate(by_layer[layer]) if other != row)

    fair = [layer for layer in later if spares(layer)] or later
    return min(fair, key=lambda layer: by_layer[layer][row].ratio, default=0)
