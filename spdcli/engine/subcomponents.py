"""The slices of a matrix: U, V, their masked product and where they start.

In the paper's orientation slice c is `U[:, c] (x) V[c]`: a row vector x is read by `x @ U[:, c]` and
written along `V[c]`. Other SPD code swaps the two letters. I d_in, O d_out, C slices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spdcli.engine.importance import Importances
from spdcli.engine.part_tables import DISTINCT, STARTS
from spdcli.engine.sigmoid import leaky_hard_sigmoid
from spdcli.engine.target import Matrix
from spdcli.errors import SpdError

MERGED = 0.05  # by how much more rows may differ, of their norm, when they are too many
RANK = 1e-5  # of the largest singular value: what is smaller does not count as a direction of the data


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
    weight: Tensor, slices: int, inputs: Tensor | None, moment: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Gaussian directions, scaled so that `U V` has the norm of W."""
    d_in, d_out = weight.shape
    U = _directions(d_in, slices, generator, weight)
    V = _directions(slices, d_out, generator, weight)
    return U, V * (weight.norm() / (U @ V).norm())


def inputs_start(
    weight: Tensor, slices: int, inputs: Tensor | None, moment: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A slice for each of C rows of `inputs` `[n, I]`, drawn at random: it reads the row's direction and writes what W
    makes of it, as large on either side. Of `inputs` `U V` makes as much as W does, in norm.

    Rows of which W makes nothing are left out, and slices for which none is left write nothing.
    """
    if inputs is None:
        raise ValueError("a start at inputs needs the matrix's inputs")
    made = inputs @ weight
    some = made.norm(dim=1) > 0
    if not some.any():
        return random_start(weight, slices, inputs, moment, generator)
    drawn = torch.randperm(int(some.sum()), generator=generator)[:slices].to(weight.device)
    read = inputs[some][drawn]
    size = read.norm(dim=1, keepdim=True)
    read, write = read / size, made[some][drawn] / size
    root = write.norm(dim=1, keepdim=True).sqrt()
    U, V = _filled((read * root).t(), write / root, slices, generator)
    scale = (made.norm() / (inputs @ U @ V).norm()).sqrt()
    return U * scale, V * scale


def svd_start(
    weight: Tensor, slices: int, inputs: Tensor | None, moment: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The largest singular triples of W, the root of each value on either side; spare slices write nothing yet."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return _padded(left, values, right, slices, generator)


def svd_span_start(
    weight: Tensor, slices: int, inputs: Tensor | None, moment: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """As `svd_start`, of W restricted to the span of the data: the rows of `inputs` `[n, I]`."""
    if inputs is None:
        raise ValueError("svd_span needs the matrix's inputs")
    _, values, basis = torch.linalg.svd(inputs, full_matrices=False)
    basis = basis[values > RANK * values[0]]
    left, values, right = torch.linalg.svd(basis @ weight, full_matrices=False)
    return _padded(basis.t() @ left, values, right, slices, generator)


def svd_text_start(
    weight: Tensor, slices: int, inputs: Tensor | None, moment: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The C slices that leave least of what W writes on text: of all U V of rank C the smallest E ‖x W - x U V‖².

    With the second moment E xᵀx = L Lᵀ `[I, I]` of the text's inputs that is ‖Lᵀ (W - U V)‖², so they are the largest
    singular triples of Lᵀ W, read through L⁻ᵀ.
    """
    if moment is None:
        raise ValueError("svd_text needs the second moment of the matrix's inputs")
    root = torch.linalg.cholesky(moment)
    left, values, right = torch.linalg.svd(root.t() @ weight.to(moment), full_matrices=False)
    read, write = _padded(left, values, right, slices, generator)
    count = min(slices, len(values))
    read[:, :count] = torch.linalg.solve_triangular(root.t(), read[:, :count], upper=True)
    size = (write[:count].norm(dim=1) / read[:, :count].norm(dim=0)).sqrt()  # as large on either side
    read[:, :count] *= size
    write[:count] /= size[:, None]
    return read.to(weight.dtype), write.to(weight.dtype)


def dual_start(
    weight: Tensor, slices: int, inputs: Tensor | None, moment: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One slice a distinct row x_t of `inputs` `[n, I]`: it reads x_t as 1 and the others as 0, and writes `x_t W`.

    Its own token's share of W from the first step, by construction and not by learning; spare slices write nothing.
    Raises SpdError where there are more distinct rows than slices or dimensions: no dual exists then.
    """
    return _dual(weight, slices, inputs, None, generator)


def dual_whitened_start(
    weight: Tensor, slices: int, inputs: Tensor | None, moment: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """As `dual_start`, with the reads that answer least to other text: `moment` `[I, I]` is its second moment."""
    if moment is None:
        raise ValueError("a whitened dual start needs the second moment of the matrix's inputs")
    return _dual(weight, slices, inputs, moment, generator)


def _dual(
    weight: Tensor, slices: int, inputs: Tensor | None, moment: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    if inputs is None:
        raise ValueError("a dual start needs the matrix's inputs")
    rows = distinct_rows(inputs)
    room = min(slices, weight.shape[0])
    if len(rows) > room:
        raise no_dual(len(rows), room)
    read, write = dual_directions(rows, moment), rows @ weight
    size = (write.norm(dim=1) * read.norm(dim=0)).sqrt()
    return _filled(read * (size / read.norm(dim=0)), write * (size / write.norm(dim=1))[:, None], slices, generator)


def no_dual(inputs: int, room: int) -> SpdError:
    """What is said where a dual start finds so many distinct `inputs`, and `room` for fewer."""
    return SpdError(
        f"a dual start needs a slice for each of the data's {inputs} distinct inputs; there is room for {room}",
        "raise slices.C, give fewer or shorter prompts, or choose another slices.init",
    )


def dual_directions(rows: Tensor, moment: Tensor | None = None) -> Tensor:
    """R `[I, n]` with `rows @ R` = 1 (as far as the rows are independent), for `rows` X `[n, I]`.

    Of all such R the smallest one, the pseudo-inverse of X; with `moment` C (invertible) the one whose answers to
    inputs of that second moment are smallest, trace Rᵀ C R: `C⁻¹ Xᵀ (X C⁻¹ Xᵀ)⁺`.
    """
    wide = rows.double()
    if moment is None:
        return torch.linalg.pinv(wide, rtol=RANK).to(rows.dtype)
    root = torch.linalg.cholesky(moment.to(wide))
    white = torch.linalg.solve_triangular(root, wide.t(), upper=False)  # [I, n], of unit second moment
    read = torch.linalg.solve_triangular(root.t(), torch.linalg.pinv(white.t(), rtol=RANK), upper=True)
    return read.to(rows.dtype)


def distinct_rows(inputs: Tensor, tolerance: float = DISTINCT) -> Tensor:
    """The rows of `inputs` `[n, I]` that are no repetition of an earlier one: prompts that begin alike share inputs.

    Rows are the same when they differ by less than `tolerance` of the larger norm.
    """
    apart = torch.cdist(inputs, inputs, compute_mode="donot_use_mm_for_euclid_dist")  # the quick way cancels
    size = inputs.norm(dim=1)
    same = apart <= tolerance * torch.maximum(size[:, None], size)
    return inputs[~same.tril(-1).any(1)]


def fitting_rows(inputs: Tensor, distinct: float, fill: float | None, room: int) -> Tensor:
    """The distinct rows of `inputs` `[n, I]`; with `fill` by the first tolerance, from `distinct` on in steps of
    MERGED, that leaves at most `fill * room` of them.

    Duals of nearly as many rows as there are dimensions answer to everything: the fewer rows, the smaller they are.
    """
    rows = distinct_rows(inputs, distinct)
    while fill is not None and len(rows) > fill * room and distinct < 1:
        distinct += MERGED
        rows = distinct_rows(inputs, distinct)
    return rows


def _padded(
    left: Tensor, values: Tensor, right: Tensor, slices: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    count = min(slices, values.shape[0])
    root = values[:count].sqrt()
    return _filled(left[:, :count] * root, root[:, None] * right[:count], slices, generator)


def _filled(read: Tensor, write: Tensor, slices: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`read` `[I, n]` and `write` `[n, O]` as the first n of C slices; the others read something and write nothing."""
    count = read.shape[1]
    U = _directions(read.shape[0], slices, generator, read)
    V = write.new_zeros(slices, write.shape[1])
    U[:, :count], V[:count] = read, write
    return U, V


def _directions(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Gaussian `[rows, columns]` with columns of norm about 1."""
    numbers = torch.randn(rows, columns, generator=generator, dtype=like.dtype)
    return numbers.to(like.device) / rows**0.5


class SliceSet(nn.Module):
    """Slices, U `[I, C]` and V `[C, O]`, of several matrices of one target: all that a forward pass needs.

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


def detached(slices: SliceSet) -> SliceSet:
    """The same slices, which get no gradient."""
    own = {name: slices.of(name) for name in slices.names}
    copies = {name: Slices(each.U.detach(), each.V.detach()) for name, each in own.items()}
    return SliceSet(copies, slices.delta).requires_grad_(False)


class Decomposition(SliceSet):
    """Slices and importance functions of the chosen matrices of one target."""

    def __init__(self, slices: dict[str, Slices], importances: Importances, delta: bool) -> None:
        super().__init__(slices, delta)
        self.importances = importances

    def importance(
        self, inputs: dict[str, Tensor], valid: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`g_lower` (for masks) and `g_upper` (for minimality), `[B, T, C]` a matrix, from the matrices' inputs.

        `valid` `[B, T]` is False at padding; None, which is faster, where there is none.
        """
        read = {name: self.of(name).U for name in self.names}
        raw = self.importances(inputs, read, valid)
        both = {name: leaky_hard_sigmoid(values) for name, values in raw.items()}
        return {n: lower for n, (lower, _) in both.items()}, {n: upper for n, (_, upper) in both.items()}


def start_slices(
    matrices: dict[str, Matrix],
    slices: int,
    start: str,
    inputs: dict[str, Tensor] | None,
    seed: int,
    moments: dict[str, Tensor] | None = None,
    distinct: float = DISTINCT,
    fill: float | None = None,
) -> dict[str, Slices]:
    """Fresh slices, U `[I, C]` and V `[C, O]`, for every matrix; `slices` is C, `start` a key of `part_tables.STARTS`.

    `inputs[m]` `[n, I]` is the data of starts that need inputs, `moments[m]` `[I, I]` for those that need a moment. To
    a dual start inputs are one where they differ by at most `distinct` of the larger norm; with `fill` by as much more
    as it takes until they are no more than that share of the slices and of the dimensions that there are.
    """
    generator = torch.Generator().manual_seed(seed)
    started = {}
    for name, matrix in matrices.items():
        weight = matrix.weight.detach()
        precise = torch.promote_types(weight.dtype, torch.float32)  # half precision has no SVD
        data = None if inputs is None else inputs[name].to(precise)
        if data is not None and STARTS[start].fixed_data:
            data = fitting_rows(data, distinct, fill, min(slices, weight.shape[0]))
        moment = None if moments is None else moments[name].to(weight.device)
        U, V = STARTS[start].load()(weight.to(precise), slices, data, moment, generator)
        started[name] = Slices(U.to(weight.dtype), V.to(weight.dtype))
    return started
