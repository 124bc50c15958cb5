"""Toys whose parts are known: models of sparse features, trained on the spot, that the first SPD paper took apart.

    TMS         x' = ReLU(Wᵀ W x + b), or ReLU(Wᵀ I W x + b): more features than dimensions, in superposition
    ResidMLP    x' = W_Eᵀ (W_E x + MLPs): ReLUs of more features than there are neurons, over one or several layers

"Stochastic Parameter Decomposition", Bushnaq, Braun and Sharkey, 2025. An input has one position. There is no
attention, and outputs are vectors. Letters: B inputs, F features, D width of what blocks read and write.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spdcli.engine.target import Matrix, Target
from spdcli.targets.routes import Route, back_through, through, unchanged


@dataclass(frozen=True)
class TMSShape:
    """`features` in `hidden` dimensions; with `identity` a fixed identity matrix stands between W and Wᵀ."""

    features: int = 5
    hidden: int = 2
    identity: bool = False


@dataclass(frozen=True)
class ResidMLPShape:
    """`layers` MLPs of `d_mlp` neurons each on a residual stream of width `d_model`, which holds all `features`."""

    features: int = 100
    d_model: int = 1000
    d_mlp: int = 50
    layers: int = 1


class FeatureToy(nn.Module):
    """What the engine and the measures ask of a toy of sparse features.

    `embedding` `[F, D]` carries features to what the first block reads, and its transpose the last block's output to
    the toy's. `forward` takes and gives `[B, 1, F]`. Features that are on lie between `lowest` and 1.
    """

    lowest: float
    embedding: Tensor
    blocks: nn.ModuleList

    @property
    def features(self) -> int:
        return len(self.embedding)

    def labels(self, features: Tensor) -> Tensor:
        """What the toy is trained to answer on inputs `[B, 1, F]`."""
        raise NotImplementedError

    def modules_by_matrix(self) -> dict[str, tuple[nn.Linear, int]]:
        """Every matrix that can be decomposed, in the order of execution: its module and its block."""
        raise NotImplementedError

    def reads(self) -> dict[str, Tensor]:
        """What a matrix reads of each feature at 1, `[F, I]`, of the matrices that read features themselves."""
        raise NotImplementedError

    def routes(self) -> dict[str, Route]:
        """The linear way from each matrix to the features, for the labels of its slices."""
        raise NotImplementedError

    def training_outputs(self, features: Tensor) -> Tensor:
        """As `forward`, while it is trained."""
        return self(features)

    def settle(self) -> None:
        """Called after a step of training, before the toy is used."""


class TMSBlock(nn.Module):
    """The whole of a TMS: W, the identity where there is one, Wᵀ with its bias, ReLU."""

    def __init__(self, shape: TMSShape) -> None:
        super().__init__()
        self.read = nn.Linear(shape.features, shape.hidden, bias=False)
        self.middle = nn.Linear(shape.hidden, shape.hidden, bias=False) if shape.identity else None
        self.write = nn.Linear(shape.hidden, shape.features)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.read(features)
        if self.middle is not None:
            hidden = self.middle(hidden)
        return F.relu(self.write(hidden))


class TMS(FeatureToy):
    """A toy model of superposition (Elhage et al., 2022). Its matrices are W, I and WT, which is W transposed.

    W starts large (Xavier) and b at 0, as theirs: from a small W and a random b the ReLUs die on some seeds, and the
    toy answers 0 to everything.
    """

    lowest = 0.0

    def __init__(self, shape: TMSShape) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TMSBlock(shape)])
        nn.init.xavier_normal_(self.block.read.weight)
        nn.init.zeros_(self.block.write.bias)
        self.block.write.weight.requires_grad_(False)  # it is W's transpose
        if self.block.middle is not None:
            self.block.middle.weight.requires_grad_(False).copy_(torch.eye(shape.hidden))
        self.register_buffer("embedding", torch.eye(shape.features), persistent=False)
        self.settle()

    @property
    def block(self) -> TMSBlock:
        """The only one."""
        return self.blocks[0]  # type: ignore[return-value]

    def forward(self, features: Tensor) -> Tensor:
        """`[B, 1, F]` to `[B, 1, F]`."""
        return self.block(features)

    def labels(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features

    def training_outputs(self, features: Tensor) -> Tensor:
        """One W for both ways; the identity changes nothing."""
        W = self.block.read.weight
        return F.relu(F.linear(F.linear(features, W), W.t(), self.block.write.bias))

    @torch.no_grad()
    def settle(self) -> None:
        """Makes WT the transpose of W."""
        self.block.write.weight.copy_(self.block.read.weight.t())

    def modules_by_matrix(self) -> dict[str, tuple[nn.Linear, int]]:
        middle = {} if self.block.middle is None else {"I": (self.block.middle, 0)}
        return {"W": (self.block.read, 0), **middle, "WT": (self.block.write, 0)}

    def reads(self) -> dict[str, Tensor]:
        return {"W": self.embedding}

    def routes(self) -> dict[str, Route]:
        read, write = self.block.read.weight.t().detach(), self.block.write.weight.t().detach()
        hidden = read.shape[1]
        into, onward = back_through(read, hidden), through(write, unchanged, hidden)
        middle = {} if self.block.middle is None else {"I": Route(into=into, out=onward)}
        return {"W": Route(out=onward), **middle, "WT": Route(into=into)}


class ResidMLPBlock(nn.Module):
    """One MLP on the residual stream, without biases."""

    def __init__(self, shape: ResidMLPShape) -> None:
        super().__init__()
        self.read = nn.Linear(shape.d_model, shape.d_mlp, bias=False)
        self.write = nn.Linear(shape.d_mlp, shape.d_model, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        return stream + self.write(F.relu(self.read(stream)))


class ResidMLP(FeatureToy):
    """A toy of compressed computation. Its matrices are W_in and W_out of every layer, counted from 0.

    The embedding is fixed: random rows of norm 1, and their transpose for the way out.
    """

    lowest = -1.0

    def __init__(self, shape: ResidMLPShape) -> None:
        super().__init__()
        self.register_buffer("embedding", F.normalize(torch.randn(shape.features, shape.d_model), dim=1))
        self.blocks = nn.ModuleList(ResidMLPBlock(shape) for _ in range(shape.layers))

    def forward(self, features: Tensor) -> Tensor:
        """`[B, 1, F]` to `[B, 1, F]`."""
        stream = features @ self.embedding
        for block in self.blocks:
            stream = block(stream)
        return stream @ self.embedding.t()

    def labels(self, features: Tensor) -> Tensor:
        """x + ReLU(x) of every feature x."""
        return features + F.relu(features)

    def _parts(self) -> list[tuple[nn.Linear, nn.Linear]]:
        return [(block.read, block.write) for block in self.blocks]  # type: ignore[misc]

    def modules_by_matrix(self) -> dict[str, tuple[nn.Linear, int]]:
        pairs = [(number, read, write) for number, (read, write) in enumerate(self._parts())]
        return {
            name: (module, number)
            for number, read, write in pairs
            for name, module in ((f"W_in{number}", read), (f"W_out{number}", write))
        }

    def reads(self) -> dict[str, Tensor]:
        return {f"W_in{number}": self.embedding for number in range(len(self.blocks))}

    def routes(self) -> dict[str, Route]:
        routes = {}
        for number, (read, write) in enumerate(self._parts()):
            neurons = read.out_features
            routes[f"W_in{number}"] = Route(out=through(write.weight.t().detach(), unchanged, neurons))
            routes[f"W_out{number}"] = Route(into=back_through(read.weight.t().detach(), neurons))
        return routes


def feature_target(toy: FeatureToy) -> Target:
    """The toy as the engine sees it: features in the place of tokens, vectors in the place of logits."""
    toy.requires_grad_(False)
    return Target(
        model=toy,
        blocks=list(toy.blocks),
        run=toy,
        finish=nn.Identity(),
        unembedding=toy.embedding,
        unembedding_bias=None,
        embedding=toy.embedding,
        matrices={
            name: Matrix(name, module, block, (0, module.out_features), transposed=True)
            for name, (module, block) in toy.modules_by_matrix().items()
        },
        output_loss="mse",
    )
