"""Runs a target's blocks with pieces of one run put into another: what causal tracing asks for.

Every *interchange* is a row of one batch: it starts as a row of the base run, gets pieces of a row of the source run at
one token, and enters at the first block that differs from the base run, as the variants of a plan do. Rows are replayed
through the blocks together, and one hook a part puts all their pieces in. R rows, T positions, D width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spdcli.engine.rows import by_sequence, hidden_of, rows_of
from spdcli.engine.target import Target

STATE, PARTS = "state", ("mlp", "attention")
KINDS = (STATE, *PARTS)
Calls = Sequence[tuple[tuple, dict]]


class Site(NamedTuple):
    """A place in a run of one sequence: what is put in, at `token`.

    `kind` is state (what leaves block `last`, `first` being the same), or mlp or attention (what these parts of the
    blocks `first` to `last` write).
    """

    kind: str
    token: int
    first: int
    last: int

    @property
    def entry(self) -> int:
        """The first block that sees a difference; the number of blocks when none does."""
        return self.last + 1 if self.kind == STATE else self.first


class Interchange(NamedTuple):
    """One row: row `base` of the base run, with the piece at `site` from row `source` of the source run."""

    site: Site
    base: int
    source: int


@dataclass(frozen=True, eq=False)
class Recorded:
    """What R rows leave behind in every block: `states[b]` `[R, T, D]` enters block b and the last one leaves the last
    block; `parts[kind][b]` `[R, T, D]` is what that part of block b writes."""

    states: list[Tensor]
    parts: dict[str, list[Tensor]]


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def recorded_run(target: Target, calls: Calls, entering: Tensor) -> Recorded:
    """Run all blocks on `entering` `[R, T, D]` and keep everything; `calls` are a clean pass's of one sequence."""
    parts: dict[str, list[Tensor]] = {kind: [] for kind in PARTS}
    states, index = [entering], _only_sequence(entering)

    def keeper(kind: str) -> Callable:  # of copies: Falcon adds its attention to what its MLP gave, in place
        return lambda module, args, output: parts[kind].append(by_sequence(hidden_of(output), entering).clone())

    with _hooked({module: keeper(kind) for kind in PARTS for module in target.parts[kind]}):
        for block, call in zip(target.blocks, calls, strict=True):
            args, kwargs = rows_of(call, 1, index, target.by_head)
            states.append(hidden_of(block(states[-1], *args, **kwargs)))
    return Recorded(states, parts)


def _only_sequence(rows: Tensor) -> Tensor:
    return torch.zeros(len(rows), dtype=torch.long, device=rows.device)


@torch.no_grad()
def interchanged_run(
    target: Target, calls: Calls, base: Recorded, source: Recorded, interchanges: Sequence[Interchange]
) -> Tensor:
    """Hidden states after the last block, `[R, T, D]`, of R `interchanges`, ordered by their site's entry.

    `base` and `source` are recorded runs; `calls` are a clean pass's of one sequence, which all rows are run with.
    """
    rows = _Rows(base, source, interchanges)
    hidden = base.states[0][:0]
    for number in range(interchanges[0].site.entry, len(target.blocks)):
        hidden = torch.cat([hidden, rows.entering(number)])
        args, kwargs = rows_of(calls[number], 1, _only_sequence(hidden), target.by_head)
        with _hooked({target.parts[kind][number]: rows.putter(kind, number) for kind in PARTS}):
            hidden = hidden_of(target.blocks[number](hidden, *args, **kwargs))
    return torch.cat([hidden, rows.entering(len(target.blocks))])


class _Rows:
    """Interchanges as tensors, so that no block loops over them."""

    def __init__(self, base: Recorded, source: Recorded, interchanges: Sequence[Interchange]) -> None:
        self.run, self.other = base, source
        columns = [(KINDS.index(s.kind), s.token, s.first, s.last, s.entry, b, o) for s, b, o in interchanges]
        table = torch.tensor(columns, device=base.states[0].device)
        self.kind, self.token, self.first, self.last, self.entry, self.base, self.source = table.unbind(1)
        assert bool((self.entry.diff() >= 0).all()), "interchanges must be ordered by entry"

    def entering(self, block: int) -> Tensor:
        """The rows `[r, T, D]` that enter at `block`, with their state put in if that is their piece."""
        own = (self.entry == block).nonzero()[:, 0]
        fresh = self.run.states[block].index_select(0, self.base[own])
        states = (self.kind[own] == KINDS.index(STATE)).nonzero()[:, 0]
        rows = own[states]
        fresh[states, self.token[rows]] = self.other.states[block][self.source[rows], self.token[rows]]
        return fresh

    def putter(self, kind: str, block: int) -> Callable:
        """A hook for the part `kind` of `block`: its output with the pieces of the rows that want one there."""
        concerned = (self.kind == KINDS.index(kind)) & (self.first <= block) & (block <= self.last)
        own = concerned.nonzero()[:, 0]  # all of them have entered, since first is their entry

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if not len(own):
                return output
            changed = hidden_of(output).clone()
            by_row = changed.view(-1, *self.run.states[0].shape[1:])
            by_row[own, self.token[own]] = self.other.parts[kind][block][self.source[own], self.token[own]]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook
