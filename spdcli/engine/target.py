"""What the engine needs to know about a target: its blocks, its matrices, its two ends.

The targets package builds a `Target`; the engine only walks it. Shape letters: B sequences,
T positions, I d_in, O d_out, N vocabulary, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight that can be decomposed: a module's weight, or some of its output columns.

    `transposed` is True where the module stores `[O, I]` (nn.Linear) and False for `[I, O]`
    (GPT-2's Conv1D). `columns` are the output columns `[start, stop)` this matrix covers: all of
    them, or a third of a fused `c_attn`. Where a module's output is made of several `groups` of
    equal width side by side, they are the columns that it covers in each: a `query_key_value`
    may hold q, k and v of one head, then of the next.
    """

    name: str
    module: nn.Module
    block: int
    columns: tuple[int, int]
    transposed: bool
    groups: int = 1

    @property
    def stored(self) -> Tensor:
        """`W` as `[I, O]` in the numbers that the module holds; a view of its own weight if there is one group."""
        stored = self.module.get_parameter("weight")
        return self.covered(stored.t() if self.transposed else stored)

    @property
    def weight(self) -> Tensor:
        """`W` as `[I, O]` in float32 or better, which its slices are held in; else as `stored`."""
        return at_least_float32(self.stored)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the covered columns, `[O]` in float32 or better, or None."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else at_least_float32(self.covered(bias))

    @property
    def d_in(self) -> int:
        return self.module.get_parameter("weight").shape[1 if self.transposed else 0]

    @property
    def d_out(self) -> int:
        return self.groups * (self.columns[1] - self.columns[0])

    def covered(self, output: Tensor) -> Tensor:
        """The covered columns, `[..., O]`, of something as wide as the module's whole output."""
        grouped = output.unflatten(-1, (self.groups, -1))
        return grouped[..., self.columns[0] : self.columns[1]].flatten(-2)

    def with_covered(self, output: Tensor, own: Tensor) -> Tensor:
        """A copy of the module's whole `output` with `own` `[..., O]` in the covered columns."""
        changed = output.unflatten(-1, (self.groups, -1)).clone()
        changed[..., self.columns[0] : self.columns[1]] = own.unflatten(-1, (self.groups, -1))
        return changed.flatten(-2)

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Put `weight` `[I, O]` into the module."""
        stored = self.module.get_parameter("weight")
        whole = stored.t() if self.transposed else stored
        whole.copy_(self.with_covered(whole, weight.to(whole)))


def at_least_float32(numbers: Tensor) -> Tensor:
    """The same numbers in float32 if they are narrower: what probabilities, slices and gates are worked out in."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities `[..., N]` of logits `[..., N]`, in float32 or better: the one place where they are made."""
    return at_least_float32(logits).log_softmax(-1)


class LogitMap(NamedTuple):
    """What a model makes of its unembedding's output z: logits `cap tanh(scale z / cap)`, or `scale z` without cap."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, raw: Tensor) -> Tensor:
        """Logits of `raw` `[..., N]`; `raw` itself where nothing is to be done."""
        if self == AS_THEY_ARE:
            return raw
        scaled = self.scale * at_least_float32(raw)
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of every logit, as `of` gave it, by its own raw one."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap).square())


AS_THEY_ARE = LogitMap()


@dataclass(frozen=True)
class LookedAt:
    """Where the n positions are that a batch's losses look at (`Batch.looked`).

    `spots` `[n]` are their places in the batch laid flat, `[B * T]`, in order. The numbers beside it are the host's, so
    that a GPU is not waited for: `firsts[i]` is how many of them come before sequence i (B + 1 numbers, the last one
    n); `ends`, whether they are the last position of every sequence and no other; `padded`, whether the batch has
    padding anywhere.
    """

    spots: Tensor
    firsts: list[int]
    ends: bool
    padded: bool


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens to run a target on.

    `tokens` `[B, T]` are token ids; of a target that reads vectors, `[B, T, N]` are the vectors. `valid` `[B, T]` is
    False at padding, which is always at the end. `looked` `[B, T]` is True at the positions whose next-token
    distribution, or output vector, the losses compare. `answers` `[B]` are the tokens that should follow, where there
    is one for every sequence. `classes[name]` `[B, T]` is True at the toy's positions of that class: s1, m, s2, random.
    """

    tokens: Tensor
    valid: Tensor
    looked: Tensor
    answers: Tensor | None = None
    classes: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def everywhere(cls, tokens: Tensor) -> Batch:
        """Sequences without padding, looked at in every position."""
        real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return cls(tokens, real, real)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed the same way."""
        return Batch(
            change(self.tokens),
            change(self.valid),
            change(self.looked),
            None if self.answers is None else change(self.answers),
            {name: change(mask) for name, mask in self.classes.items()},
        )

    @cached_property
    def looked_at(self) -> LookedAt:
        """Where the positions are that losses look at. It reads numbers out of the tensors, so make a batch on the
        host and move it with `to`, which keeps what is known."""
        assert bool((self.valid[:, :-1] >= self.valid[:, 1:]).all()), "padding must be at the end"
        firsts = [0, *self.looked.sum(1).cumsum(0).tolist()]
        return LookedAt(
            spots=self.looked.flatten().nonzero()[:, 0],
            firsts=firsts,
            ends=firsts == list(range(len(self.looked) + 1)) and bool(self.looked[:, -1].all()),
            padded=not bool(self.valid.all()),
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, for which the host does not wait if it is a GPU."""
        batch = self.map(lambda tensor: sent(tensor, device))
        batch.__dict__["looked_at"] = replace(self.looked_at, spots=sent(self.looked_at.spots, device))
        return batch

    def part(self, start: int, stop: int) -> Batch:
        """Sequences `start .. stop - 1`. As with `to`, nothing is read out of tensors."""
        batch, at = self.map(lambda tensor: tensor[start:stop]), self.looked_at
        first, last = at.firsts[start], at.firsts[stop]
        spots = at.spots[first:last] - start * self.valid.shape[1]
        firsts = [number - first for number in at.firsts[start : stop + 1]]
        batch.__dict__["looked_at"] = replace(at, spots=spots, firsts=firsts)
        return batch

    def select(self, rows: Tensor) -> Batch:
        """The sequences whose numbers are `rows` `[n]`."""
        return self.map(lambda tensor: tensor[rows])


# Gives the minibatch of a number, from 0: fresh data by the generator, a corpus in an order of its own.
Batches = Callable[[torch.Generator, int], Batch]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, for which the host does not wait if it is a GPU."""
    return tensor.to(device, non_blocking=device.type == "cuda")


@dataclass(eq=False)
class Target:
    """A frozen model, seen as: `run` (tokens through all blocks), the blocks, `finish`, unembedding.

    `run(tokens)` calls the `blocks` in order on tokens `[B, T]`; the engine listens in with hooks, so what it returns
    does not matter. A block takes a hidden state `[R, T, D]` first and gives one, alone or first in a tuple. `finish`
    is the final norm, `[..., D]` to the same (identity where there is none); logits are what it gives, times
    `unembedding` `[N, D]` transposed, plus `unembedding_bias` `[N]`, through `logit_map`. `embedding` `[N, D]` has a
    row a token.
    `output_loss`, a key of `loss_choices.OUTPUT_LOSSES`, says how variants are compared with it: a target whose outputs
    are vectors of N features, and no logits, has `mse`, and reads such vectors in place of tokens.

    `matrices` holds every matrix that can be decomposed, by name, in the order of execution; parts of one module are
    neighbours and together cover all its columns. While `record_patterns()` is open, every block that runs appends its
    attention log-probabilities `[R, H, T, T]` (None where blocks cannot). `last_block`, called like the last block,
    gives its output at the last position alone, `[R, 1, D]` (None where it cannot). `parts[kind]` are the modules, one
    a block, whose outputs are added to the stream: `mlp` and `attention` (empty where a block is no such sum).
    `embedding_scale` multiplies an embedding on its way into the stream. A tensor that a block is called with by a name
    in `by_head` has as many rows a sequence as there are heads.
    """

    model: nn.Module
    blocks: list[nn.Module]
    run: Callable[[Tensor], object]
    finish: Callable[[Tensor], Tensor]
    unembedding: Tensor  # [N, D]
    unembedding_bias: Tensor | None
    embedding: Tensor  # [N, D]
    matrices: dict[str, Matrix]
    record_patterns: Callable[[], AbstractContextManager[list[Tensor]]] | None = None
    last_block: Callable[..., Tensor] | None = None
    parts: Mapping[str, list[nn.Module]] = field(default_factory=dict)
    output_loss: str = "kl"
    logit_map: LogitMap = AS_THEY_ARE
    embedding_scale: float = 1.0
    by_head: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        return self.unembedding.device

    @property
    def precision(self) -> torch.dtype:
        """The numbers of slices, gates and what matrices read: the model's own, or float32 where those are narrower."""
        return torch.promote_types(self.unembedding.dtype, torch.float32)

    def outputs(self, hidden: Tensor) -> Tensor:
        """Logits, or output vectors, `[..., N]` of what leaves the last block, `hidden` `[..., D]`."""
        return self.logit_map.of(F.linear(self.finish(hidden), self.unembedding, self.unembedding_bias))

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next token, `[..., N]`, of what leaves the last block, `hidden` `[..., D]`."""
        return log_probabilities(self.outputs(hidden))
