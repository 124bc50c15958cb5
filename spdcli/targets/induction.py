"""The induction toy of section 5.1: a small transformer with attention alone, trained on the spot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spdcli.engine.fit import FitState
from spdcli.engine.optimise import set_rate
from spdcli.engine.target import Matrix, Target
from spdcli.targets.routes import Route, back_through, final_scale, through, unchanged
from spdcli.targets.sequences import InductionSequences
from spdcli.targets.toy_state import toy_diverged

CPU = torch.device("cpu")
ACCURACY_BATCH = 1024  # sequences that an accuracy is measured on at once: more would need more memory than training


@dataclass(frozen=True)
class ToyShape:
    """The hyperparameters of Table 3 that shape the toy. The s token comes on top of `vocabulary`, as does the begin
    token that every sequence has with `begin_token`."""

    layers: int = 2
    heads: int = 1
    d_model: int = 16
    vocabulary: int = 128
    length: int = 64
    positions: str = "before"
    layer_norm: bool = False
    feed_forward: bool = False
    output_projection: bool = False
    begin_token: bool = False

    @property
    def sequences(self) -> InductionSequences:
        """What the toy reads."""
        return InductionSequences(self.length, self.vocabulary, self.begin_token)


def sinusoids(length: int, width: int) -> Tensor:
    """The fixed position encodings of Vaswani et al., `[length, width]`: sines in even columns."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(length)[:, None] * frequencies
    encodings = torch.zeros(length, width)
    encodings[:, 0::2] = angles.sin()
    encodings[:, 1::2] = angles.cos()[:, : width // 2]
    return encodings


class ToyBlock(nn.Module):
    """Causal attention, and a feed-forward part where the shape asks for one.

    Position encodings are added to what Q and K read (`before`) or to what they write (`after`), and to nothing else:
    the residual stream and V never carry a position. `after` is the authors' public code; what Q and K read at a token
    is then the same wherever it stands.
    """

    def __init__(self, shape: ToyShape) -> None:
        super().__init__()
        width = shape.d_model
        self.heads, self.after = shape.heads, shape.positions == "after"
        self.norm = nn.LayerNorm(width) if shape.layer_norm else nn.Identity()
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False) if shape.output_projection else nn.Identity()
        if shape.feed_forward:
            self.ff_norm = nn.LayerNorm(width) if shape.layer_norm else nn.Identity()
            self.up = nn.Linear(width, 4 * width, bias=False)
            self.down = nn.Linear(4 * width, width, bias=False)
        self.feed_forward = shape.feed_forward
        self.recorded: list[Tensor] | None = None  # see recorded_patterns

    def forward(self, hidden: Tensor, positions: Tensor, last: bool = False) -> Tensor:
        """`hidden` `[B, T, D]`; `positions` `[1, T, D]`, zeros where they were added at the embedding.

        With `last` only the last position is worked out, `[B, 1, D]`.
        """
        normed = self.norm(hidden)
        read = normed if self.after else normed + positions
        asking = slice(-1, None) if last else slice(None)
        query, key, value, hidden = self.q(read[:, asking]), self.k(read), self.v(normed), hidden[:, asking]
        if self.after:
            query, key = query + positions[:, asking], key + positions
        if self.recorded is not None:
            self.recorded.append(self.scores(query, key).log_softmax(-1))
        q, k, v = self.split(query), self.split(key), self.split(value)
        values = F.scaled_dot_product_attention(q, k, v, is_causal=not last).transpose(-2, -3).flatten(-2)
        hidden = hidden + self.o(values)
        if self.feed_forward:
            hidden = hidden + self.down(F.relu(self.up(self.ff_norm(hidden))))
        return hidden

    def split(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # [B, H, T, K]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores `[B, H, t, T]` of the last t queries `q` `[B, t, D]` on keys `k` `[B, T, D]`, -inf at later ones."""
        query, key = self.split(q), self.split(k)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1 + k.shape[1] - q.shape[1])
        return scores.masked_fill(future, float("-inf"))


class InductionToy(nn.Module):
    """The whole toy: `forward` gives next-token logits, `stream` the residual stream that they are made from."""

    positions: Tensor

    def __init__(self, shape: ToyShape) -> None:
        super().__init__()
        self.shape = shape
        tokens = shape.sequences.tokens
        self.embed = nn.Embedding(tokens, shape.d_model)
        self.blocks = nn.ModuleList(ToyBlock(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.d_model) if shape.layer_norm else nn.Identity()
        self.unembed = nn.Linear(shape.d_model, tokens, bias=False)
        self.register_buffer("positions", sinusoids(shape.length, shape.d_model), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits at every position of `tokens` `[B, T]`, `[B, T, N]`."""
        return self.unembed(self.norm(self.stream(tokens)))

    def stream(self, tokens: Tensor, last: bool = False) -> Tensor:
        """The last block's output `[B, T, D]`; with `last` at the last position alone, `[B, 1, D]`."""
        places = self.positions[None, : tokens.shape[1]]  # [T, D] would pass for sequences where B = T
        hidden = self.embed(tokens)
        if self.shape.positions == "added":
            hidden, places = hidden + places, torch.zeros_like(places)
        for block in self.blocks[:-1]:
            hidden = block(hidden, places)
        return self.blocks[-1](hidden, places, last=last)

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits at the last position, `[B, N]`."""
        return self.unembed(self.norm(self.stream(tokens, last=True)[:, 0]))


@contextmanager
def recorded_patterns(toy: InductionToy) -> Iterator[list[Tensor]]:
    """While open, every block that runs appends its attention log-probabilities `[B, H, T, T]`."""
    patterns: list[Tensor] = []
    blocks = [block for block in toy.blocks if isinstance(block, ToyBlock)]
    try:
        for block in blocks:
            block.recorded = patterns
        yield patterns
    finally:
        for block in blocks:
            block.recorded = None


def toy_target(toy: InductionToy) -> Target:
    """The toy as the engine sees it. Matrices are named as in Table 1: Q0, K0, V0, Q1, ..."""
    toy.requires_grad_(False)
    matrices = {}
    letters = {"Q": "q", "K": "k", "V": "v"}
    if toy.shape.output_projection:
        letters["O"] = "o"
    if toy.shape.feed_forward:
        letters |= {"Up": "up", "Down": "down"}
    for index, block in enumerate(toy.blocks):
        for letter, attribute in letters.items():
            module = getattr(block, attribute)
            name = f"{letter}{index}"
            matrices[name] = Matrix(name, module, index, (0, module.out_features), transposed=True)
    return Target(
        model=toy,
        blocks=list(toy.blocks),
        run=lambda tokens: toy.stream(tokens),
        finish=toy.norm,
        unembedding=toy.unembed.weight,
        unembedding_bias=None,
        embedding=toy.embed.weight,
        matrices=matrices,
        record_patterns=lambda: recorded_patterns(toy),
        last_block=lambda hidden, positions, last: toy.blocks[-1](hidden, positions, last=True),
    )


def toy_routes(toy: InductionToy) -> dict[str, Route]:
    """How each matrix of the toy hangs on the residual stream, for the labels of its slices.

    Exact but for the embedding's path through earlier blocks; with an output projection, V writes through it.
    """
    routes = {}
    end = final_scale(toy.norm) if isinstance(toy.norm, nn.LayerNorm) else unchanged
    for index, block in enumerate(toy.blocks):
        assert isinstance(block, ToyBlock)
        norm = block.norm
        routes[f"Q{index}"] = routes[f"K{index}"] = Route(norm, out=None)
        routes[f"V{index}"] = Route(norm, out=end)
        head_width = toy.shape.d_model // toy.shape.heads
        if isinstance(block.o, nn.Linear):
            routes[f"V{index}"] = Route(norm, out=through(block.o.weight.t(), end, head_width))
            routes[f"O{index}"] = Route(norm, back_through(block.v.weight.t(), head_width), end)
        if block.feed_forward:
            ff_norm = block.ff_norm
            routes[f"Up{index}"] = Route(ff_norm, out=through(block.down.weight.t(), end, head_width))
            routes[f"Down{index}"] = Route(ff_norm, back_through(block.up.weight.t(), head_width), end)
    return routes


def train_toy(
    toy: InductionToy, state: FitState, batch: int, steps: int, log_every: int
) -> Iterator[dict[str, float] | None]:
    """Train a toy on fresh sequences until `steps`, with the loss on the last token alone (section 5.1, Table 3).

    Yields after every step: `{step, loss, accuracy, rate}` every `log_every` steps and after the last one, None
    elsewhere; loss is cross-entropy in nats. `toy` and `state` are changed in place, so that the loop may be left after
    any step and gone on with later. Raises SpdError when the loss of such a step is not finite.
    """
    optimiser = state.optimiser
    device = next(toy.parameters()).device
    for step in range(state.step + 1, steps + 1):
        data = toy.shape.sequences.draw(batch, state.generators["data"]).to(device)
        logits = toy.logits(data.tokens)
        answers = data.answers
        assert answers is not None
        loss = F.cross_entropy(logits, answers)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        rate = set_rate(optimiser, state.schedule, step - 1)
        optimiser.step()
        state.step = step
        if step % log_every and step not in (1, steps):
            yield None
            continue
        if not loss.isfinite():
            raise toy_diverged(f"the loss is {loss.item()}", step)
        accuracy = logits.argmax(-1).eq(answers).float().mean()
        yield {"step": step, "loss": loss.item(), "accuracy": accuracy.item(), "rate": rate}


@torch.no_grad()
def toy_accuracy(toy: InductionToy, sequences: int, generator: torch.Generator) -> float:
    """Share of `sequences` fresh sequences on which the toy's best guess is m."""
    data = toy.shape.sequences.draw(sequences, generator)
    device = next(toy.parameters()).device
    assert data.answers is not None
    guesses = [toy.logits(part.to(device)).argmax(-1).cpu() for part in data.tokens.split(ACCURACY_BATCH)]
    return torch.cat(guesses).eq(data.answers).float().mean().item()
