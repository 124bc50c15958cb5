"""Which of several processes updates which parameter, and holds its moments, where these would be large.

Every process has all parameters and all gradients, and the optimizer's two moments of its own parameters alone: with K
processes a parameter takes 2 + 2 / K numbers of each, and not 4. After an update every owner sends what it has updated.
Sharding the parameters themselves, as FSDP does, would have all processes go backward through the same gates in the
same order; by rows each goes through the gates of its own matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.engine.processes import Processes

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam and its kin, as large as their parameter; beside them a count of steps


@dataclass(frozen=True, eq=False)
class Ownership:
    """The trained parameters, in their `groups`, and by their number through all groups the rank of their owner."""

    groups: list[list[Tensor]]
    owners: list[int]
    processes: Processes

    @property
    def own(self) -> list[list[Tensor]]:
        """This process's own parameters, by group."""
        mine = iter(self.owners)
        return [[p for p in group if next(mine) == self.processes.rank] for group in self.groups]

    @property
    def own_numbers(self) -> list[int]:
        """The numbers of its own parameters, in the order in which an optimizer of `own` counts them."""
        return [number for number, owner in enumerate(self.owners) if owner == self.processes.rank]

    @torch.no_grad()
    def spread(self) -> None:
        """Make every parameter what it is in its owner. All processes call this together, here and below."""
        for parameter, owner in zip(self._parameters, self.owners, strict=True):
            self.processes.follow([parameter.data], owner)

    def moments(self, optimiser: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
        """The state of every parameter that has one, by its number, from the owners' optimizers."""
        states = [optimiser.state.get(parameter, {}) for parameter in self._parameters]
        begun = self.processes.numbers([float(bool(state)) for state in states])
        whole: dict[int, dict[str, Tensor]] = {}
        for number, (parameter, state) in enumerate(zip(self._parameters, states, strict=True)):
            if not begun[number]:
                continue
            values = {"step": torch.zeros((), device=parameter.device)} | {n: parameter.data.clone() for n in MOMENTS}
            values |= {name: value.clone() for name, value in state.items()}
            self.processes.follow([values[name] for name in ("step", *MOMENTS)], self.owners[number])
            whole[number] = {name: value.cpu() for name, value in values.items()} if self.processes.rank == 0 else {}
        return whole

    @property
    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.groups for parameter in group]


def divided(groups: Sequence[Sequence[Tensor]], processes: Processes) -> Ownership:
    """The parameters of `groups` divided between `processes`: the largest first, each to the one with least so far."""
    parameters = [parameter for group in groups for parameter in group]
    held, owners = [0] * processes.count, [0] * len(parameters)
    for number in sorted(range(len(parameters)), key=lambda number: -parameters[number].numel()):
        owner = held.index(min(held))
        owners[number] = owner
        held[owner] += parameters[number].numel()
    return Ownership([list(group) for group in groups], owners, processes)
