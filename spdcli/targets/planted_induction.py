"""Exact induction, planted: every trigger s is followed by some m, and where s comes again the answer is its m.

Two blocks of attention with one head, and position vectors that are added to what Q and K read, as in the toy
(`induction.py`). A sequence holds every trigger with its m, anywhere and in any order, and asks for all of them at its
end. The slices, and where each is needed:

    Q0, K0   one a position: the query at t meets the key at t - 1          Q0 at m, K0 at s1
    V0       one a trigger: reads it and writes its flag, "s came before"   at s1
    Q1, K1   one a trigger: its query meets the key of its flag             Q1 at s2, K1 at m
    V1       one an ordinary token: reads it and writes it as the answer    at m

Many decompositions must not be as good as the planted one. So attention looks both ways: were later keys hidden, what
a query's slice does to them would not matter; likewise if a sequence held one trigger alone. And beside the keys there
is a *sink*, which holds nothing: a query that finds no key attends to it. Without, it attends to all keys alike, flags
end up where no slice is needed that reads them, and it is open which slice of K1 reads them there. Nor is the softmax
over keys, or that over answers, saturated, where a slice that is too long, or lowers another answer, would not show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spdcli.engine.target import Batch, Matrix, Target
from spdcli.targets.planted import Planted, planted_slices, set_weights, skewed_frame, spread_strengths

# Scores of the one key that a query looks for, by layer; all other keys are at 0. With a sink they are so much above
# it, which gives the key four fifths of the attention. Without, 6 in the first layer too would let half a query do as
# well as a whole one, and two slices could share what each of them does.
ABOVE_SINK, WITHOUT_SINK = (1.5, 1.5), (4.0, 6.0)
LOGIT = 3.0  # of the answer; all others are at 0


def sink_score(length: int) -> float:
    """The sink's score among `length` keys: it has nine tenths of the attention of a query that finds none."""
    return 4.0 + math.log(length / 7)


@dataclass(frozen=True)
class PlantedInductionShape:
    """`tokens` ordinary tokens are numbered from 0, the `triggers` come after them; sequences have `length` tokens.

    `skew` is how far directions are from orthogonal, `strength_ratio` that of the strongest slice of a matrix to its
    weakest. `sink` is whether attention has one.
    """

    tokens: int = 8
    triggers: int = 2
    length: int = 8
    d_model: int = 32
    skew: float = 0.3
    strength_ratio: float = 4.0
    sink: bool = True

    @property
    def places(self) -> int:
        """Where s1 may stand: m follows, and s2 of all triggers come last."""
        return self.length - self.triggers - 1


class PlantedBlock(nn.Module):
    """Attention of one head, both ways, without an output projection; positions are added to what Q and K read."""

    def __init__(self, width: int, sink: float | None) -> None:
        super().__init__()
        self.sink = sink
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in "qkv")

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """`hidden` `[B, T, D]`, `positions` `[1, T, D]`."""
        read = hidden + positions
        scores = self.q(read) @ self.k(read).mT / math.sqrt(hidden.shape[-1])
        return hidden + attention(scores, self.sink) @ self.v(hidden)


def attention(scores: Tensor, sink: float | None) -> Tensor:
    """The softmax of `scores` `[..., T, T]` over keys, beside which a sink of that score takes its share."""
    if sink is None:
        return scores.softmax(-1)
    return F.pad(scores, (1, 0), value=sink).softmax(-1)[..., 1:]


def found_share(score: float, length: int, sink: float | None) -> float:
    """Of a query's attention, the share of the one key that it looks for; the other `length` - 1 are at 0."""
    return float(attention(F.pad(torch.tensor([score]), (0, length - 1)), sink)[0])


class PlantedInduction(nn.Module):
    """Embedding, two blocks, unembedding: logits `[B, T, N]` of tokens `[B, T]`."""

    positions: Tensor

    def __init__(self, tokens: int, length: int, width: int, sink: float | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(PlantedBlock(width, sink) for _ in range(2))
        self.unembed = nn.Linear(width, tokens, bias=False)
        self.register_buffer("positions", torch.zeros(length, width))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, places = self.embed(tokens), self.positions[None, : tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden, places)
        return self.unembed(hidden)


def planted_induction(shape: PlantedInductionShape, seed: int) -> Planted:
    """The circuit in directions that `seed` draws."""
    generator = torch.Generator().manual_seed(seed)
    tokens, triggers, width = shape.tokens, shape.triggers, shape.d_model
    sizes = [tokens, triggers, shape.length, triggers, tokens]
    ordinary, trigger, place, flag, answer = torch.arange(sum(sizes)).split(sizes)
    frame = lambda count: skewed_frame(count, width, shape.skew, generator)  # noqa: E731
    stream, keys, flagged = frame(sum(sizes)), frame(shape.length), frame(triggers)
    place_strengths, trigger_strengths, token_strengths = (
        spread_strengths(count, shape.strength_ratio, generator) for count in (shape.places, triggers, tokens)
    )
    s1 = torch.arange(shape.places)
    read = stream.duals
    sink = sink_score(shape.length) if shape.sink else None
    scores = WITHOUT_SINK if sink is None else [sink + above for above in ABOVE_SINK]
    flag_share, copied_share = (found_share(score, shape.length, sink) for score in scores)
    first, second = ((score * width**0.5) ** 0.5 for score in scores)  # attention divides by the root of its width
    slices = {
        "Q0": planted_slices(read[:, place[s1 + 1]], keys.duals.t()[s1], first * place_strengths),
        "K0": planted_slices(read[:, place[s1]], keys.rows[s1], first / place_strengths),
        "V0": planted_slices(read[:, trigger], stream.rows[flag], trigger_strengths**0.5),
        "Q1": planted_slices(read[:, trigger], flagged.duals.t(), second * trigger_strengths**0.5),
        "K1": planted_slices(read[:, flag], flagged.rows, second / flag_share / trigger_strengths),
        "V1": planted_slices(read[:, ordinary], stream.rows[answer], token_strengths),
    }
    model = PlantedInduction(tokens + triggers, shape.length, width, sink)
    with torch.no_grad():
        model.embed.weight.copy_(stream.rows[: tokens + triggers])
        model.unembed.weight.zero_()
        model.unembed.weight[:tokens] = (LOGIT / copied_share * read[:, answer] / token_strengths).t().float()
        model.positions.copy_(stream.rows[place])
    target = induction_target(model)
    set_weights(target, slices)
    return Planted(
        target=target,
        slices=slices,
        draw=lambda count, source: draw_sequences(shape, count, source),
        needed=lambda batch: needed_slices(shape, batch),
        length=shape.length,
    )


def induction_target(model: PlantedInduction) -> Target:
    """The model as the engine sees it; its matrices are named as the toy's."""
    model.requires_grad_(False).eval()
    matrices = {}
    for index, block in enumerate(model.blocks):
        assert isinstance(block, PlantedBlock)
        for letter, module in (("Q", block.q), ("K", block.k), ("V", block.v)):
            name = f"{letter}{index}"
            matrices[name] = Matrix(name, module, index, (0, module.out_features), transposed=True)
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


def draw_sequences(shape: PlantedInductionShape, count: int, generator: torch.Generator) -> Batch:
    """`count` sequences of ordinary tokens, in which every trigger stands once, followed by its m, and once more among
    the last tokens, in random order.

    The classes are s1, m, s2 and random; the s2 are looked at. `answers` are the m of the last of them.
    """
    length, triggers, places = shape.length, shape.triggers, shape.places
    tokens = torch.randint(shape.tokens, (count, length), generator=generator)
    s1 = spread_places(count, triggers, places, generator)
    named = lambda: torch.rand(count, triggers, generator=generator).argsort(-1) + shape.tokens  # noqa: E731
    tokens.scatter_(1, s1, named())
    tokens[:, length - triggers :] = named()
    classes = {"s1": torch.zeros(count, length, dtype=torch.bool).scatter_(1, s1, True)}
    classes["m"] = classes["s1"].roll(1, 1)
    classes["s2"] = (torch.arange(length) >= length - triggers).expand(count, -1)
    classes["random"] = ~(classes["s1"] | classes["m"] | classes["s2"])
    asked = classes["s1"] & (tokens == tokens[:, -1:])
    answers = tokens[torch.arange(count), asked.int().argmax(1) + 1]
    return replace(Batch.everywhere(tokens), looked=classes["s2"], answers=answers, classes=classes)


def spread_places(count: int, chosen: int, places: int, generator: torch.Generator) -> Tensor:
    """`[count, chosen]`: places in ascending order, no two of them neighbours; every such choice is as likely."""
    room = places - chosen + 1
    picked = torch.rand(count, room, generator=generator).argsort(-1)[:, :chosen].sort(-1).values
    return picked + torch.arange(chosen)


def needed_slices(shape: PlantedInductionShape, batch: Batch) -> dict[str, Tensor]:
    """Which slices of each matrix every position needs, `[B, T, P]`."""
    tokens, s1, m, s2 = batch.tokens[..., None], *(batch.classes[name][..., None] for name in ("s1", "m", "s2"))
    numbers = torch.arange(max(shape.tokens, shape.length), device=tokens.device)
    ordinary, trigger = numbers[: shape.tokens], shape.tokens + numbers[: shape.triggers]
    position = numbers[: shape.length, None]
    return {
        "Q0": m & (position - 1 == numbers[: shape.places]),
        "K0": s1 & (position == numbers[: shape.places]),
        "V0": s1 & (tokens == trigger),
        "Q1": s2 & (tokens == trigger),
        "K1": m & (tokens.roll(1, 1) == trigger),
        "V1": m & (tokens == ordinary),
    }
