"""A lookup in two hops, planted: two blocks that are one MLP each, and tokens that name some of the subjects.

The first MLP turns every subject of a token into a link, the second the link into an answer; which leads where is
random. Each subject has a pair of neurons between Up and Down; it pushes one up and the other down. The slices:

    Up0, Down0   one a subject: reads it and fires its neurons; reads those and turns the subject into its link
    Up1, Down1   one a link: reads it and fires its neurons; reads those and turns the link into its answer

What is looked up is taken out of the residual stream (`answer - link`): beside it, its reader would be as good.

A neuron passes what is above a *floor* below 0. The target never pushes one that far, slices that overshoot do; at a
floor of 0, what a slice takes away where nothing is would not matter, and many decompositions would be as good as the
planted one. Neurons are at 0 where nothing pushes them: a level that all of them idle at would be one more thing that a
slice of Down can read.

A position needs the slices of the subjects that its token names, and no others. The first tokens name one subject
each, and are the answers; the others name two, every pair as often as another, or once less: a subject that is named
beside the same other one mostly is as well served by a slice of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spdcli.engine.target import Batch, Matrix, Target
from spdcli.targets.planted import Planted, planted_slices, set_weights, skewed_frame, spread_strengths

LOGIT = 3.0  # of an answer, others are at 0; a softmax sure of its answers would not show what lowers another one
FLOOR = -0.75  # of a neuron, times the strongest slice, which pushes it by 0.71 times its strength


@dataclass(frozen=True)
class PlantedLookupShape:
    """So many `subjects`, and `tokens` that name one or two of them; sequences have `length` tokens.

    `skew` is how far directions are from orthogonal, `strength_ratio` that of the strongest slice of a matrix to its
    weakest.
    """

    subjects: int = 10
    tokens: int = 30
    length: int = 8
    d_model: int = 32
    skew: float = 0.3
    strength_ratio: float = 4.0


class LookupBlock(nn.Module):
    """An MLP beside the residual stream: `hidden + Down(max(floor, Up(hidden)))`."""

    def __init__(self, width: int, neurons: int, floor: float) -> None:
        super().__init__()
        self.floor = floor
        self.up = nn.Linear(width, neurons, bias=False)
        self.down = nn.Linear(neurons, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(self.up(hidden).clamp(min=self.floor))


class LookupModel(nn.Module):
    """Embedding, two blocks, unembedding: logits `[B, T, N]` of tokens `[B, T]`."""

    def __init__(self, shape: PlantedLookupShape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.tokens, shape.d_model)
        floor = FLOOR * shape.strength_ratio**0.5
        self.blocks = nn.ModuleList(LookupBlock(shape.d_model, 2 * shape.subjects, floor) for _ in range(2))
        self.unembed = nn.Linear(shape.d_model, shape.tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.unembed(hidden)


def planted_lookup(shape: PlantedLookupShape, seed: int) -> Planted:
    """The model in directions, and with tokens, that `seed` draws."""
    generator = torch.Generator().manual_seed(seed)
    subjects = shape.subjects
    stream = skewed_frame(3 * subjects, shape.d_model, shape.skew, generator)
    subject, link, answer = torch.arange(3 * subjects).split(subjects)
    named = subjects_of_tokens(shape, generator)
    link = link[torch.randperm(subjects, generator=generator)]
    answers, answer = answer, answer[torch.randperm(subjects, generator=generator)]
    neurons, slices = pairs_of_neurons(subjects), {}
    for block, (source, aim) in enumerate(((subject, link), (link, answer))):
        strengths = spread_strengths(subjects, shape.strength_ratio, generator)
        slices[f"Up{block}"] = planted_slices(stream.duals[:, source], neurons, strengths)
        slices[f"Down{block}"] = planted_slices(neurons.t(), stream.rows[aim] - stream.rows[source], 1 / strengths)
    model = LookupModel(shape)
    with torch.no_grad():
        model.embed.weight.copy_(named.double() @ stream.rows[subject])
        model.unembed.weight.zero_()
        model.unembed.weight[:subjects] = LOGIT * stream.duals[:, answers].t().float()
    target = lookup_target(model)
    set_weights(target, slices)
    named = named.bool()
    return Planted(
        target=target,
        slices=slices,
        draw=lambda count, source: Batch.everywhere(
            torch.randint(shape.tokens, (count, shape.length), generator=source)
        ),
        needed=lambda batch: dict.fromkeys(slices, named.to(batch.tokens.device)[batch.tokens]),
        length=shape.length,
    )


def subjects_of_tokens(shape: PlantedLookupShape, generator: torch.Generator) -> Tensor:
    """`[N, subjects]`: 1 where a token names a subject. One each first, then pairs in random order, again and again."""
    pairs = torch.combinations(torch.arange(shape.subjects))
    rounds = math.ceil((shape.tokens - shape.subjects) / len(pairs))
    drawn = torch.cat([pairs[torch.randperm(len(pairs), generator=generator)] for _ in range(rounds)] or [pairs[:0]])
    one, two = torch.eye(shape.subjects), F.one_hot(drawn, shape.subjects).sum(1).float()
    return torch.cat([one, two])[: shape.tokens]


def pairs_of_neurons(count: int) -> Tensor:
    """`[count, 2 count]`: each of `count` slices fires a pair of neurons of its own, one up and one down, with norm 1.

    Reading a pair along the same direction gives what fired it.
    """
    up = torch.eye(count, dtype=torch.float64)
    return torch.stack([up, -up], dim=-1).flatten(1) / 2**0.5


def lookup_target(model: LookupModel) -> Target:
    """The model as the engine sees it; its matrices are Up0, Down0, Up1, Down1."""
    model.requires_grad_(False).eval()
    matrices = {}
    for index, block in enumerate(model.blocks):
        assert isinstance(block, LookupBlock)
        for name, module in (("Up", block.up), ("Down", block.down)):
            matrices[f"{name}{index}"] = Matrix(f"{name}{index}", module, index, (0, module.out_features), True)
    return Target(
        model=model,
        blocks=list(model.blocks),
        run=model,
        finish=nn.Identity(),
        unembedding=model.unembed.weight,
        unembedding_bias=None,
        embedding=model.embed.weight,
        matrices=matrices,
    )
