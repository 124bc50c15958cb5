"""The part of a step that one of several processes works out: some of its sequences, or some of its plan's rows.

    by sequences   a process runs the target on its own sequences alone, and everything that follows from them
    by rows        every process knows all importances of the batch, runs its own rows of the plan (variant, sample,
                   sequence), and sends the summed gradient of the importances through the gates of its own matrices

By rows two prompts keep as many processes busy as there are rows. Either way what all processes add to a loss or to a
gradient sums to what one process would have, and each draws the random numbers of the whole step and takes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.processes import ALONE, Processes
from spdcli.engine.target import Batch
from spdcli.engine.variants import Numbers, Piece, Variant, draw_variants


def cut(total: int, rank: int, count: int, turn: int = 0) -> tuple[int, int]:
    """Where part `rank` of `count` parts of 0 .. `total` - 1 begins and ends; their sizes differ by one at most.

    The first parts have what is left over, or with `turn` those after as many have had it before.

    >>> [cut(5, rank, 3) for rank in range(3)], [cut(5, rank, 3, turn=1) for rank in range(3)]
    ([(0, 2), (2, 4), (4, 5)], [(0, 2), (2, 3), (3, 5)])
    """
    each, left = divmod(total, count)
    sizes = [each + ((part - turn * left) % count < left) for part in range(rank + 1)]
    return sum(sizes[:-1]), sum(sizes)


def variants_of_a_step(losses: LossSettings, matrices: int) -> int:
    """How many variants the plan of a step has, of a decomposition of so many `matrices`."""
    blocks, draw = dict.fromkeys(map(str, range(matrices)), 0), torch.Generator()
    wanted, few = losses.reconstruction, losses.layerwise_matrices
    return len(draw_variants(wanted, blocks, losses.samples, losses.subset, (1, 1), draw, few))


@dataclass(frozen=True, eq=False)
class Portion:
    """What this one of the `processes` works out of a step on the batch `whole`."""

    whole: Batch
    processes: Processes = ALONE
    by_rows: bool = False

    @property
    def sequences(self) -> tuple[int, int]:
        """The first and last but one of the sequences whose importances this process works out."""
        total = len(self.whole.tokens)
        return (0, total) if self.by_rows else cut(total, self.processes.rank, self.processes.count)

    @property
    def batch(self) -> Batch:
        """Those sequences."""
        start, stop = self.sequences
        return self.whole if stop - start == len(self.whole.tokens) else self.whole.part(start, stop)

    @property
    def positions(self) -> Tensor:
        """How many real positions the whole batch has, one number."""
        return self.whole.valid.sum()

    @property
    def add_up(self) -> Callable[[Sequence[Tensor]], None]:
        """Makes tensors their sum over all processes, in place."""
        return self.processes.add_up

    def of_loss(self, loss: str, value: Tensor) -> Tensor:
        """This process's part of the `value` of a loss, which may be known whole: that of frequency by sequences."""
        return value / self.processes.count if loss == "frequency" and not self.by_rows else value

    def weights(self, names: Sequence[str]) -> list[str]:
        """The matrices, of all `names`, whose faithfulness is this process's to work out."""
        return list(names[self.processes.rank :: self.processes.count])

    def gates(self, names: Sequence[str]) -> list[str]:
        """The matrices, of all `names`, of which this process sends gradients through the importance functions."""
        return self.weights(names) if self.by_rows else list(names)

    def pieces(self, chunk: Sequence[Piece], order: Mapping[Variant, int]) -> list[Piece]:
        """This process's part of a `chunk` of the plan; `order` numbers all the plan's variants.

        Some pieces may be left empty, for the random numbers that they have to pass over.
        """
        if self.processes.count == 1:
            return list(chunk)
        own = [self._piece(piece, order[piece.variant]) for piece in chunk]
        return [piece for piece in own if len(piece) or piece.variant.numbers is None]

    def _piece(self, piece: Piece, number: int) -> Piece:
        rank, count = self.processes.rank, self.processes.count
        start, stop = cut(len(self.whole.tokens), rank, count, number if self.by_rows else 0)
        first = min(max(piece.start, start), piece.stop)
        last = max(first, min(piece.stop, stop))
        before, after = first - piece.start, piece.stop - last
        if self.by_rows:
            return Piece(piece.variant, first, last, before, after)
        return Piece(self._variant(piece.variant), first - start, last - start, before, after)

    def _variant(self, variant: Variant) -> Variant:
        """`variant` as it is of this process's sequences alone."""
        own = slice(*self.sequences)
        routed, numbers = variant.routed, variant.numbers
        if routed is not None:
            routed = {name: where[own] for name, where in routed.items()}
        if numbers is not None:
            numbers = {name: Numbers(_part(n.mask, own), _part(n.delta, own)) for name, n in numbers.items()}
        return replace(variant, routed=routed, numbers=numbers, whole=variant)


def _part(numbers: Tensor, own: slice) -> Tensor:
    """The sequences `own` of `numbers` `[B, T, ...]`, or what all sequences share, `[1, ...]`."""
    return numbers if len(numbers) == 1 else numbers[own]
