"""What slices do over a corpus, in one pass and in memory that does not grow with it.

For every slice, of a text of n tokens:

    density      the share of tokens at which it is active
    importance   its mean importance over all tokens
    contexts     where its importance is largest, at most one a sequence
    tokens       those it prefers as input, and as the next token: pointwise mutual information,
                 log p(token | slice active) / p(token), in nats
    partners     the slices that it is active with: overlap |both| / |either|

S slices in all, C of one matrix, B sequences of T positions, N vocabulary, K contexts of W tokens, P preferred tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Batch
from spdcli.errors import UsageError
from spdcli.measures.importances import importances_of, refuse_span
from spdcli.measures.matrix_patterns import matrices_like
from spdcli.measures.pair_counts import PairCounts
from spdcli.progress import Progress, Report, silent
from spdcli.runs.subject import Subject
from spdcli.targets.text_windows import Windows, in_order

CONTEXTS, PREFERRED, PARTNERS = 10, 10, 10  # that are kept of a slice
BEFORE, AFTER = 16, 8  # tokens of a context around the one that it is of
NO_TOKEN = -1  # where a context begins before its sequence, or ends after it
MOST_SLICES = 8192  # partners are counted in a square of them
PAIRS = 1 << 24  # of a slice and a token, that are counted
AT_ONCE = 1024  # tokens of text
OFTEN = 2  # a token that a slice met less often is no preference


@dataclass(frozen=True, eq=False)
class Preferred:
    """The tokens that slices prefer, best first: `tokens` `[S, P]` (NO_TOKEN: no more), their `information` in nats and
    how often slice and token met, `counts`."""

    tokens: Tensor
    information: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False)
class Harvest:
    """What the slices of `matrices` (names, each with its C, in order) do over so many `tokens` of text.

    `density`, `importance` `[S]`. `contexts` `[S, K, W]` are tokens, the one that counts at place BEFORE; `strengths`
    `[S, K]` its importance, the largest first, 0 where there are no more. `partners` `[S, P]` are numbers of slices,
    the nearest first, with their `overlaps`. A slice is active above `threshold`; no pair of a slice and a token was
    counted more than `missed` times too few.
    """

    matrices: Mapping[str, int]
    tokens: int
    threshold: float
    density: Tensor
    importance: Tensor
    contexts: Tensor
    strengths: Tensor
    inputs: Preferred
    following: Preferred
    partners: Tensor
    overlaps: Tensor
    missed: int

    @property
    def slices(self) -> list[str]:
        """The addresses of all S slices."""
        return [f"{name}:{c}" for name, count in self.matrices.items() for c in range(count)]


class Harvester:
    """Adds up sequences, batch by batch; `result` is what they come to."""

    def __init__(self, matrices: Mapping[str, int], vocabulary: int, threshold: float, pairs: int = PAIRS) -> None:
        self.matrices, self.vocabulary, self.threshold = dict(matrices), vocabulary, threshold
        count = sum(matrices.values())
        if count > MOST_SLICES:
            raise UsageError(
                f"{count} slices are more than the {MOST_SLICES} of a harvest", "--matrix takes some of them"
            )
        self.tokens = 0
        self.active = torch.zeros(count, dtype=torch.long)
        self.active_before_next = torch.zeros(count, dtype=torch.long)
        self.importance = torch.zeros(count, dtype=torch.float64)
        self.strengths = torch.zeros(count, CONTEXTS)
        self.contexts = torch.full((count, CONTEXTS, BEFORE + 1 + AFTER), NO_TOKEN)
        self.together = torch.zeros(count, count, dtype=torch.int32)
        self.pairs = {"input": PairCounts(pairs), "next": PairCounts(pairs)}
        self.seen = {
            "input": torch.zeros(vocabulary, dtype=torch.long),
            "next": torch.zeros(vocabulary, dtype=torch.long),
        }

    def add(self, tokens: Tensor, g: Mapping[str, Tensor]) -> None:
        """Sequences `tokens` `[B, T]` without padding, with the importances g `[B, T, C]` of every matrix."""
        tokens = tokens.cpu()
        values = torch.cat([g[name] for name in self.matrices], dim=-1).float().cpu()  # [B, T, S]
        on = values > self.threshold
        self.tokens += tokens.numel()
        self.active += on.sum((0, 1))
        self.active_before_next += on[:, :-1].sum((0, 1))
        self.importance += values.sum((0, 1), dtype=torch.float64)
        flat = on.flatten(0, 1).float()
        self.together += (flat.t() @ flat).to(torch.int32)
        self._keep_contexts(tokens, torch.where(on, values, 0.0))
        self._count("input", tokens, on)
        self._count("next", tokens[:, 1:], on[:, :-1])

    def _keep_contexts(self, tokens: Tensor, values: Tensor) -> None:
        """The largest importance of every slice in every sequence, where it is among the slice's largest so far."""
        strongest, at = values.max(1)  # [B, S]
        edges = torch.nn.functional.pad(tokens, (BEFORE, AFTER), value=NO_TOKEN)
        places = at[..., None] + torch.arange(BEFORE + 1 + AFTER)  # [B, S, W]
        windows = edges[torch.arange(len(tokens))[:, None, None], places].transpose(0, 1)
        strengths = torch.cat([self.strengths, strongest.t()], dim=1)
        self.strengths, best = strengths.topk(CONTEXTS, dim=1)
        everything = torch.cat([self.contexts, windows], dim=1)
        self.contexts = everything.gather(1, best[..., None].expand(-1, -1, everything.shape[2]))

    def _count(self, which: str, tokens: Tensor, on: Tensor) -> None:
        self.seen[which] += tokens.flatten().bincount(minlength=self.vocabulary)
        sequence, position, slices = on.nonzero(as_tuple=True)
        self.pairs[which].add((slices * self.vocabulary + tokens[sequence, position]).numpy())

    def result(self) -> Harvest:
        """What all sequences come to."""
        active = self.active.float()
        either = active[:, None] + active[None, :] - self.together
        overlaps = (self.together / either.clamp(min=1)).fill_diagonal_(0)
        nearest, partners = overlaps.topk(min(PARTNERS, len(active)), dim=1)
        missed = max(pairs.missed for pairs in self.pairs.values())
        tokens = max(1, self.tokens)
        return Harvest(
            matrices=self.matrices,
            tokens=self.tokens,
            threshold=self.threshold,
            density=active / tokens,
            importance=(self.importance / tokens).float(),
            contexts=self.contexts,
            strengths=self.strengths,
            inputs=self._preferred("input", self.active),
            following=self._preferred("next", self.active_before_next),
            partners=partners,
            overlaps=nearest,
            missed=missed,
        )

    def _preferred(self, which: str, active: Tensor) -> Preferred:
        pairs, seen, count = self.pairs[which], self.seen[which].numpy(), len(active)
        pairs.settle()
        often = pairs.counts >= OFTEN
        slices, tokens = np.divmod(pairs.keys[often], self.vocabulary)
        counts = pairs.counts[often]
        information = np.log(counts * float(seen.sum()) / (active.numpy()[slices] * seen[tokens].astype(float)))
        order = np.lexsort((-counts, -information, slices))
        slices, tokens, counts, information = (each[order] for each in (slices, tokens, counts, information))
        rank = np.arange(len(slices)) - np.searchsorted(slices, slices)
        kept = rank < PREFERRED
        best = Preferred(
            torch.full((count, PREFERRED), NO_TOKEN),
            torch.zeros(count, PREFERRED),
            torch.zeros(count, PREFERRED, dtype=torch.long),
        )
        place = (torch.from_numpy(slices[kept]), torch.from_numpy(rank[kept]))
        best.tokens[place] = torch.from_numpy(tokens[kept])
        best.information[place] = torch.from_numpy(information[kept]).float()
        best.counts[place] = torch.from_numpy(counts[kept])
        return best


@torch.no_grad()
def harvest(
    subject: Subject,
    decomposition: Decomposition,
    text: Callable[[], Windows],
    tokens: int,
    matrices: Sequence[str] = ("*",),
    threshold: float = 0.0,
    report: Report = silent,
) -> Harvest:
    """What the slices of the `matrices` (names or patterns) do over about so many `tokens` of the sequences of `text`.

    Blocks after the last decomposed matrix are not run. UsageError where gates hold on a run's own prompts alone, and
    for more slices than MOST_SLICES.
    """
    refuse_span(decomposition)
    chosen = matrices_like(decomposition.names, matrices)
    sizes = {name: decomposition.of(name).U.shape[1] for name in chosen}
    harvester = Harvester(sizes, len(subject.target.embedding), threshold)
    windows = text()
    length = windows.read(torch.arange(1)).shape[1]
    sequences = min(len(windows), -(-tokens // length))
    for part in in_order(windows, sequences, max(1, AT_ONCE // length)):
        g, _ = importances_of(subject, decomposition, Batch.everywhere(part))
        harvester.add(part, g)
        report(Progress("harvesting", harvester.tokens, sequences * length))
    return harvester.result()
