"""Fresh induction sequences as a toy and its decomposition see them: the data of section 6.1's circuit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.subcomponents import Decomposition, masked_product
from spdcli.engine.target import Target
from spdcli.measures.evaluation_data import EVALUATION_SEED
from spdcli.runs.subject import Subject
from spdcli.targets.induction import InductionToy, ToyBlock

SEQUENCES = 1024  # that `spd eval` measures the circuit on
REACH = 8  # positions either way that offsets and distances are followed


@dataclass(frozen=True, eq=False)
class CircuitData:
    """Fresh sequences as target and decomposition see them: what every measurement of the circuit starts from.

    `clean` holds what all matrices read, decomposed or not; `g[m]` `[B, T, C]` are the importances; `at[kind]` `[B]`
    says where s1, m and s2 stand; `active[m]` lists the slices of m that are active somewhere.
    """

    toy: InductionToy
    target: Target
    decomposition: Decomposition
    clean: Clean
    g: dict[str, Tensor]
    at: dict[str, Tensor]
    active: dict[str, list[int]]

    @property
    def rows(self) -> Tensor:
        """`[B]`: the numbers of the sequences, to index with beside positions."""
        return torch.arange(len(self.clean.batch.tokens), device=self.clean.batch.tokens.device)

    def block(self, index: int) -> ToyBlock:
        """One of the toy's two layers, from 0."""
        block = self.toy.blocks[index]
        assert isinstance(block, ToyBlock)
        return block

    def product(self, name: str, x: Tensor, masked: bool) -> Tensor:
        """x `[B, T, D]` through matrix `name`: the target's, or its active slices alone."""
        weight = self.target.matrices[name].weight
        if not masked or name not in self.g:
            return x @ weight
        own = self.decomposition.of(name)
        return masked_product(x, weight, own.U, own.V, self.g[name], None)

    def first_projection(self, name: str, shares: Tensor | float, masked: bool) -> Tensor:
        """Queries (Q0) or keys (K0) of the first layer `[B, T, D]`, with `shares` of the position encodings (1: as they
        are; 0: content alone; or `[B, T, 1]`)."""
        content = self.block(0).norm(self.toy.embed(self.clean.batch.tokens))
        encodings = self.toy.positions[: content.shape[1]] * shares
        if self.block(0).after:
            return self.product(name, content, masked) + encodings
        return self.product(name, content + encodings, masked)

    def carried(self) -> Tensor:
        """What the masked V1 writes at m, `[B, D]`, as s2 gets it: through the masked O1 of s2 where there is one."""
        written = self.product("V1", self.clean.inputs["V1"], masked=True)[self.rows, self.at["m"]]
        if "O1" not in self.target.matrices:
            return written
        weight = self.target.matrices["O1"].weight
        if "O1" not in self.g:
            return written @ weight
        own = self.decomposition.of("O1")
        return masked_product(written, weight, own.U, own.V, self.g["O1"][self.rows, self.at["s2"]], None)

    def projection(self, name: str) -> Tensor:
        """The target's queries or keys `[B, T, D]` in full; `name` is Q0, K0, Q1 or K1."""
        x = self.clean.inputs[name]
        return self.product(name, x, False) + (self.toy.positions[: x.shape[1]] if self.block(0).after else 0)


def has_circuit(subject: Subject) -> bool:
    """Whether the subject is a toy of the paper's kind: two layers, one head, nothing but attention (Table 3), with an
    output projection or without."""
    if subject.toy is None:
        return False
    shape = subject.toy.shape
    return (shape.layers, shape.heads) == (2, 1) and not (shape.layer_norm or shape.feed_forward)


@torch.no_grad()
def circuit_data(
    subject: Subject, decomposition: Decomposition, sequences: int, threshold: float, seed: int
) -> CircuitData:
    """`sequences` fresh sequences; the same for every toy of one length and vocabulary."""
    toy, target = subject.toy, subject.target
    assert toy is not None
    generator = torch.Generator().manual_seed(EVALUATION_SEED + 1 + seed)
    batch = toy.shape.sequences.draw(sequences, generator).to(target.device)
    clean = clean_pass(target, batch, target.matrices)
    g, _ = decomposition.importance({name: clean.inputs[name] for name in decomposition.names})
    at = {kind: batch.classes[kind].int().argmax(1) for kind in ("s1", "m", "s2")}
    active = {name: (values > threshold).flatten(0, 1).any(0).nonzero()[:, 0].tolist() for name, values in g.items()}
    return CircuitData(toy, target, decomposition, clean, g, at, active)
