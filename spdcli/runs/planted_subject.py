"""A planted model in its setting: fresh sequences to decompose it on, and a few fixed ones for people to look at."""

from __future__ import annotations

from dataclasses import replace

import torch

from spdcli.engine.target import Batch
from spdcli.recipe.planted import PlantedInductionTarget, PlantedLookupTarget
from spdcli.recipe.schema import Recipe
from spdcli.runs.module_subject import numbered_prompts, plain_route
from spdcli.runs.subject import Subject
from spdcli.targets.modules import NumberTokenizer
from spdcli.targets.planted import Planted
from spdcli.targets.planted_induction import PlantedInductionShape, planted_induction
from spdcli.targets.planted_lookup import PlantedLookupShape, planted_lookup

SHOWN = 64  # sequences that commands look at as prompts


def planted_of(recipe: Recipe) -> Planted:
    """The planted model of a recipe, on the processor; its directions are drawn from the recipe's seed."""
    sizes = recipe.target.model_dump(exclude={"kind"})
    if isinstance(recipe.target, PlantedInductionTarget):
        return planted_induction(PlantedInductionShape(**sizes), recipe.seed)
    assert isinstance(recipe.target, PlantedLookupTarget)
    return planted_lookup(PlantedLookupShape(**sizes), recipe.seed)


def planted_subject(recipe: Recipe, device: torch.device) -> Subject:
    """The subject of a planted recipe; every step draws fresh sequences."""
    planted = planted_of(recipe)
    target, size = planted.target, recipe.decompose.batch
    target.model.to(device)

    def draw(count: int, generator: torch.Generator) -> Batch:
        return planted.draw(count, generator).to(device)

    def batches(generator: torch.Generator, number: int = 0) -> Batch:
        return draw(size, generator)

    shown = planted.draw(SHOWN, torch.Generator().manual_seed(recipe.seed))
    words = NumberTokenizer(len(target.unembedding), planted.length)
    if shown.answers is None:
        prompts = numbered_prompts(replace(shown, answers=shown.tokens[:, -1]), words, str)
    else:  # they follow the last token
        answers = [str(token) for token in shown.answers.tolist()]
        prompts = numbered_prompts(shown, words, str)
        prompts = replace(prompts, answer_at=prompts.answer_at + 1, answer_texts=answers)
    return Subject(
        target=target,
        batches=batches,
        length=planted.length,
        token_text=str,
        routes={matrix: plain_route(target, matrix) for matrix in target.matrices},
        prompts=replace(prompts, batch=prompts.batch.to(device)),
        planted=planted,
    )
