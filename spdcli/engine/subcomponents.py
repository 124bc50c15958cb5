"""The slices of a matrix: U, V, their masked product and where they start.

In the paper's orientation slice c is `U[:, c] (x) V[c]`: a row vector x is read by `x @ U[:, c]` and
written along `V[c]`. Other SPD code swaps the two letters. I d_in, O d_out, C slices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spdcli.engine.importance import Importances, leaky
from spdcli.engine.target import Matrix


class Slices(nn.Module):
    """`U` `[I, C]` and `V` `[C, O]` of one matrix."""

    def __init__(self, U: Tensor, V: Tensor) -> None:
        super().__init__()
        self.U = nn.Parameter(U.contiguous())
        self.V = nn.Parameter(V.contiguous())


def masked_product(x: Tensor, weight: Tensor, U: Tensor, V: Tensor, mask: Tensor, delta: Tensor | None) -> Tensor:
    """x through the masked slices and the masked delta, `[..., O]`, never forming `U V`:

        x (U diag(m) V + d (W - U V)) = d (x W) + ((x U) * (m - d)) V.

    x `[..., I]`, mask `[..., C]`, delta `[..., 1]`, or None for a decomposition without delta (d = 0).
    """
    inner = x @ U
    if delta is None:
        return (inner * mask) @ V
    return delta * (x @ weight) + (inner * (mask - delta)) @ V


def random_start(
    weight: Tensor, slices: int, inputs: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Gaussian directions, scaled so that `U V` has the norm of W."""
    d_in, d_out = weight.shape
    U = _directions(d_in, slices, generator, weight)
    V = _directions(slices, d_out, generator, weight)
    return U, V * (weight.norm() / (U @ V).norm())


def svd_start(weight: Tensor, slices: int, inputs: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The largest singular triples of W, the root of each value on either side; spare slices write nothing yet."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return _padded(left, values, right, slices, generator)


def svd_span_start(
    weight: Tensor, slices: int, inputs: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """As `svd_start`, of W restricted to the span of the data: the rows of `inputs` `[n, I]`."""
    if inputs is None:
        raise ValueError("svd_span needs the matrix's inputs")
    _, values, basis = torch.linalg.svd(inputs, full_matrices=False)
    basis = basis[values > 1e-5 * values[0]]
    left, values, right = torch.linalg.svd(basis @ weight, full_matrices=False)
    return _padded(basis.t() @ left, values, right, slices, generator)


def _padded(
    left: Tensor, values: Tensor, right: Tensor, slices: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    kept = min(slices, values.shape[0])
    root = values[:kept].sqrt()
    U = _directions(left.shape[0], slices, generator, left)
    V = right.new_zeros(slices, right.shape[1])
    U[:, :kept] = left[:, :kept] * root
    V[:kept] = root[:, None] * right[:kept]
    return U, V


def _directions(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Gaussian `[rows, columns]` with columns of norm about 1."""
    drawn = torch.randn(rows, columns, generator=generator, dtype=like.dtype)
    return drawn.to(like.device) / rows**0.5


STARTS = {"random": random_start, "svd": svd_start, "svd_span": svd_span_start}


class SliceSet(nn.Module):
    """Slices of several matrices of one target: all that a forward pass needs.

    `delta` says whether `W - U V` takes part as one more component, with a mask of its own.
    """

    def __init__(self, slices: dict[str, Slices], delta: bool) -> None:
        super().__init__()
        self.names = list(slices)
        self.slices = nn.ModuleDict({name.replace(".", "/"): slices[name] for name in self.names})
        self.delta = delta

    def of(self, name: str) -> Slices:
        """The slices of matrix `name`."""
        return self.slices[name.replace(".", "/")]  # type: ignore[return-value]


class Decomposition(SliceSet):
    """Slices and importance functions of the chosen matrices of one target."""

    def __init__(self, slices: dict[str, Slices], importances: Importances, delta: bool) -> None:
        super().__init__(slices, delta)
        self.importances = importances

    def importance(
        self, inputs: dict[str, Tensor], valid: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`g_lower` (for masks) and `g_upper` (for minimality), `[B, T, C]` a matrix, from the matrices' inputs.

        `valid` `[B, T]` is False at padding; None where there is none.
        """
        read = {name: self.of(name).U for name in self.names}
        padded = valid is not None and not bool(valid.all())
        raw = self.importances(inputs, read, valid if padded else None)
        both = {name: leaky(values) for name, values in raw.items()}
        return {n: lower for n, (lower, _) in both.items()}, {n: upper for n, (_, upper) in both.items()}


def start_slices(
    matrices: dict[str, Matrix], slices: int, start: str, inputs: dict[str, Tensor] | None, seed: int
) -> dict[str, Slices]:
    """Fresh slices for every matrix; `start` is random, svd or svd_span, `inputs[m]` the data `[n, I]` for the last."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, matrix in matrices.items():
        weight = matrix.weight.detach()
        precise = torch.promote_types(weight.dtype, torch.float32)  # half precision has no SVD
        data = None if inputs is None else inputs[name].to(precise)
        U, V = STARTS[start](weight.to(precise), slices, data, generator)
        made[name] = Slices(U.to(weight.dtype), V.to(weight.dtype))
    return made
