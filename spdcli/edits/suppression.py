"""Suppression: rank-1 edits that take slices' directions out of a target's own weights (section 5.2).

With û and v̂ the unit read and write directions of slice k, and E_k = û_k v̂_kᵀ, one slice is suppressed by

    W ← W − <W, E> E        where <W, E> = ûᵀ W v̂ is the Frobenius inner product.

Several slices of one matrix overlap: their E_k are not orthogonal. Every way of `choices.TOGETHER` gives W − Σ a_k E_k;
with p_k = <W, E_k> and G_jk = <E_j, E_k>:

    literal       the paper's sum as it is written, every projection from the original W: a = p. What two slices share
                  is taken twice, so that <W, E_k> is not 0 afterwards in general. The order does not matter.
    orthonormal   the E_k are made orthonormal in <·,·> and W loses its projections on all of them at once. In terms
                  of the E_k themselves that is a = G⁺ p. The order does not matter, and afterwards <W, E_k> = 0 for
                  every k: no suppressed direction carries anything.
    sequence      one after the other, each projection from what is left: a = tril(G)⁻¹ p. Only the last one is sure to
                  be 0 then.

These three are equal for one slice, and for slices whose E_k are orthogonal. The fourth is about more than a direction:

    whole         each slice as it stands in the decomposition: a_k = ‖u_k‖ ‖v_k‖, so that W loses u_k v_kᵀ. It is what
                  the mask 0 does to the slice while all others and the delta stay on. Of one slice, too, this is not
                  the projection: where u_k reads an input as 1 and v_k is what W writes on it, nothing is left.

An edit is never more than these factors; it is run as `x W − ((x û) a) v̂ᵀ`, without a copy of the model.
I d_in, O d_out, r slices of a matrix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spdcli.edits.choices import TOGETHER, USUAL_TOGETHER
from spdcli.engine.subcomponents import Slices, SliceSet
from spdcli.engine.target import Target
from spdcli.engine.variants import Variant, fixed_variant
from spdcli.errors import UsageError

SAME = 1e-12  # of G's largest eigenvalue: directions that differ by less than a float32 can tell count as one


@dataclass(frozen=True)
class Address:
    """One slice: `str()` is `matrix:index`.

    >>> str(Address("h.0.mlp.c_fc", 412))
    'h.0.mlp.c_fc:412'
    """

    matrix: str
    index: int

    def __str__(self) -> str:
        return f"{self.matrix}:{self.index}"


class Factors(NamedTuple):
    """What a matrix loses, `read @ write`: read `[I, r]` of unit columns, write `[r, O]`, both in float64."""

    read: Tensor
    write: Tensor


Edit = Mapping[str, Factors]  # by matrix


def find_slices(slices: SliceSet, addresses: Iterable[str]) -> list[Address]:
    """The slices that `addresses` name, each once, in the order given. UsageError, one line, for one that is not."""
    own = []
    for text in addresses:
        name, _, digits = text.rpartition(":")
        if not name or not digits.removeprefix("-").isdecimal():
            raise UsageError(f"'{text}' is no slice", f"a slice is MATRIX:INDEX, as in {slices.names[0]}:0")
        name = find_matrix(slices.names, name, "the run decomposes")
        count = slices.of(name).U.shape[1]
        if not 0 <= int(digits) < count:
            raise UsageError(f"'{text}': {name} has the slices 0 to {count - 1}")
        own.append(Address(name, int(digits)))
    return list(dict.fromkeys(own))


def find_matrix(names: Sequence[str], name: str, who: str) -> str:
    """`name` if it is one of `names`; else UsageError with the nearest of them. `who` has them, in words."""
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise UsageError(f"{who} no matrix '{name}'; the nearest is '{nearest}'")


def by_matrix(addresses: Iterable[Address]) -> dict[str, list[int]]:
    """The indices of each matrix, in order."""
    grouped: dict[str, list[int]] = {}
    for address in addresses:
        grouped.setdefault(address.matrix, []).append(address.index)
    return grouped


class Directions(NamedTuple):
    """û `[I, r]`, v̂ `[r, O]` and the sizes ‖u‖ ‖v‖ `[r]` of r slices, in float64 on the CPU."""

    read: Tensor
    write: Tensor
    sizes: Tensor


def unit(read: Tensor, write: Tensor) -> Directions:
    """The directions of slices with `read` `[I, r]` and `write` `[r, O]` of any length but 0."""
    read, write = read.double().cpu(), write.double().cpu()
    reads, writes = read.norm(dim=0), write.norm(dim=1)
    return Directions(read / reads, write / writes[:, None], reads * writes)


def directions_of(slices: SliceSet, name: str, index: Sequence[int]) -> Directions:
    """The directions of some slices of a matrix; UsageError for a slice that is all zeros and so has none."""
    own = slices.of(name)
    directions = unit(own.U.detach()[:, list(index)], own.V.detach()[list(index)])
    for size, number in zip(directions.sizes.tolist(), index, strict=True):
        if not size > 0:
            raise UsageError(f"the slice {name}:{number} is zero: it has no direction to suppress")
    return directions


def projections(weight: Tensor, read: Tensor, write: Tensor) -> Tensor:
    """p `[r]`: the inner products <W, û_k v̂_kᵀ>, for unit `read` `[I, r]` and `write` `[r, O]`."""
    return ((read.t() @ weight.double().cpu()) * write).sum(1)


def overlaps(read: Tensor, write: Tensor) -> Tensor:
    """G `[r, r]`: <E_j, E_k> = (û_jᵀ û_k)(v̂_jᵀ v̂_k)."""
    return ((read.t() @ read) * (write @ write.t())).fill_diagonal_(1.0)


def literally(gram: Tensor, p: Tensor, sizes: Tensor) -> Tensor:
    """Literal: a_k = p_k."""
    return p


def jointly(gram: Tensor, p: Tensor, sizes: Tensor) -> Tensor:
    """Orthonormal: Σ a_k E_k is the projection of W on the span of the E_k."""
    return torch.linalg.pinv(gram, rtol=SAME, hermitian=True) @ p


def in_sequence(gram: Tensor, p: Tensor, sizes: Tensor) -> Tensor:
    """In sequence: a_k = p_k − Σ_{j<k} a_j G_jk."""
    return torch.linalg.solve_triangular(gram.tril(), p[:, None], upper=False)[:, 0]


def as_they_stand(gram: Tensor, p: Tensor, sizes: Tensor) -> Tensor:
    """Whole: a_k = ‖u_k‖ ‖v_k‖."""
    return sizes


def coefficients(together: str, gram: Tensor, p: Tensor, sizes: Tensor) -> Tensor:
    """a `[r]` from G `[r, r]`, p `[r]` and the slices' own `sizes` `[r]`, by a row of `TOGETHER`."""
    a: Tensor = TOGETHER[together].load()(gram, p, sizes)
    return a


def suppress_directions(weight: Tensor, directions: Directions, together: str = USUAL_TOGETHER) -> Factors:
    """What W `[I, O]` loses on some directions."""
    read, write, sizes = directions
    a = coefficients(together, overlaps(read, write), projections(weight, read, write), sizes)
    return Factors(read, a[:, None] * write)


def suppression(
    target: Target,
    slices: SliceSet,
    addresses: Sequence[Address],
    together: str = USUAL_TOGETHER,
    strength: float = 1.0,
) -> Edit:
    """The edit that suppresses slices in the target's own weights; `together` is a way of `TOGETHER`, and `strength`
    how much of it is done, 1 all."""
    edit = {}
    for name, index in by_matrix(addresses).items():
        lost = suppress_directions(target.matrices[name].weight, directions_of(slices, name, index), together)
        edit[name] = lost if strength == 1 else Factors(lost.read, strength * lost.write)
    return edit


def suppressions(target: Target, slices: SliceSet, addresses: Sequence[Address]) -> dict[str, Edit]:
    """The edit of every slice alone, by address: what `suppression` gives for each, a matrix at a time."""
    edits: dict[str, Edit] = {}
    for name, index in by_matrix(addresses).items():
        read, write, _ = directions_of(slices, name, index)
        cut = projections(target.matrices[name].weight, read, write)[:, None] * write
        for column, number in enumerate(index):
            own = slice(column, column + 1)
            edits[str(Address(name, number))] = {name: Factors(read[:, own], cut[own])}
    return {str(address): edits[str(address)] for address in addresses}


@dataclass(frozen=True)
class FormSizes:
    """One way to suppress several slices: what it removes from W, and how far it ends from the literal one.

    `removed` is ‖W − W'‖ / ‖W‖ and `from_literal` ‖W' − W'_literal‖ / ‖W‖, Frobenius norms all.
    """

    removed: float
    from_literal: float


@dataclass(frozen=True)
class MatrixCut:
    """What an edit takes from one matrix: an entry of `matrices` in `spd.suppress/1`.

    `projections` are the <W, E_k> of its slices; `removed` is ‖W − W'‖ / ‖W‖. `forms` are the sizes of every way of
    TOGETHER, whichever was used, and `difference` is how far orthonormal and sequence are apart, as a share of ‖W‖.
    """

    matrix: str
    slices: list[str]
    projections: list[float]
    removed: float
    difference: float
    forms: dict[str, FormSizes]


def describe(target: Target, slices: SliceSet, addresses: Sequence[Address], edit: Edit) -> list[MatrixCut]:
    """What `edit`, the suppression of slices, takes from each matrix."""
    cuts = []
    for name, index in by_matrix(addresses).items():
        weight = target.matrices[name].weight
        read, write, sizes = directions_of(slices, name, index)
        gram, p = overlaps(read, write), projections(weight, read, write)
        whole = weight.double().norm().item()

        def size(a: Tensor, gram: Tensor = gram, whole: float = whole) -> float:
            return (a @ gram @ a).clamp(min=0).sqrt().item() / whole  # of Σ a_k E_k

        a = {way: coefficients(way, gram, p, sizes) for way in TOGETHER}
        cut = MatrixCut(
            matrix=name,
            slices=[str(Address(name, number)) for number in index],
            projections=p.tolist(),
            removed=(edit[name].read @ edit[name].write).norm().item() / whole,
            difference=size(a["sequence"] - a["orthonormal"]),
            forms={way: FormSizes(size(own), size(own - a["literal"])) for way, own in a.items()},
        )
        cuts.append(cut)
    return cuts


def subtract(weight: Tensor, factors: Factors) -> Tensor:
    """`W − read @ write` `[I, O]` on the CPU in W's own precision, the same bits on every machine.

    One outer product after the other in float64, rounded once at the end: each step is a single rounded operation
    an element, so that no order of summation is left to a library.
    """
    wide = weight.detach().cpu().double().clone()
    for read, write in zip(factors.read.t(), factors.write, strict=True):
        wide -= torch.outer(read, write)
    return wide.to(weight.dtype)


def edit_variants(target: Target, edits: Mapping[str, Edit]) -> tuple[SliceSet, list[Variant]]:
    """`edits` by name, as fixed variants of a plan and the slices that they cut.

    All factors of a matrix lie side by side in one bank. With delta mask 1 a variant is the target minus the slices
    whose mask is 0, which are its own factors: `x W − (x read) write`.
    """
    like = target.unembedding.new_empty(0, dtype=target.precision)
    columns: dict[str, list[tuple[str, Factors]]] = {}
    for name, edit in edits.items():
        for matrix, factors in edit.items():
            columns.setdefault(matrix, []).append((name, factors))
    bank, masks = {}, {name: dict[str, Tensor]() for name in edits}
    for matrix, owned in columns.items():
        read = torch.cat([factors.read for _, factors in owned], dim=1)
        write = torch.cat([factors.write for _, factors in owned])
        bank[matrix] = Slices(read.to(like), write.to(like)).requires_grad_(False)
        owner = [name for name, factors in owned for _ in factors.write]
        for name, _ in owned:
            masks[name][matrix] = torch.tensor([float(other != name) for other in owner]).to(like)
    blocks = {matrix: target.matrices[matrix].block for matrix in bank}
    return SliceSet(bank, delta=True), [fixed_variant(name, masks[name], blocks, delta=1.0) for name in edits]
