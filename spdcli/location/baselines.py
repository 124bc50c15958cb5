"""What a decomposition's edits are set beside: rank-1 edits of one matrix that need no decomposition.

Each function gives an `Edit` of matrix W `[I, O]`, what W loses. x is what W reads at a token `[I]`, C the second
moment of its inputs on broad text.

    static duals   the slices that a dual start begins with, suppressed as trained ones are: what training adds to
    direct         all that W does along C⁻¹x: the read direction known to be specific to a token
    optimised      directions sought for the effect alone. Such a pair exists in nearly every matrix, so that its
                   success says nothing about where a fact is stored: it bounds what any edit of this form can do
    random         a random direction of the same norm: what the size of an edit does by itself
    singular       W's own largest directions

I d_in, O d_out, k directions of an edit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spdcli.edits.choices import USUAL_TOGETHER
from spdcli.edits.prompts_and_answers import Questions
from spdcli.edits.suppression import Edit, Factors, suppress_directions, unit
from spdcli.engine.forward import Clean, clean_pass, plan_pass, row_divergences
from spdcli.engine.masks import chunk_masks
from spdcli.engine.subcomponents import Slices, SliceSet, dual_directions
from spdcli.engine.target import Target
from spdcli.engine.variants import Piece, fixed_variant

OPTIMISER_STEPS, OPTIMISER_RATE = 25, 0.15
FLOOR = 0.01  # of its probability: an answer that has lost more than this is not pushed further
OTHERS_WEIGHT = 10.0  # of the KL on the prompts that an optimised edit should leave alone


def suppress(weight: Tensor, read: Tensor, write: Tensor, together: str = USUAL_TOGETHER) -> Factors:
    """The suppression of slices with `read` `[I, k]` and `write` `[k, O]`."""
    return suppress_directions(weight, unit(read, write), together)


def static_duals(
    target: Target,
    name: str,
    rows: Tensor,
    places: Sequence[int],
    moment: Tensor | None = None,
    together: str = USUAL_TOGETHER,
) -> Edit:
    """The untrained dual slices of the rows `places` of the data `rows` `[n, I]`, suppressed.

    Reads are dual to all rows, whitened by `moment` where it is given; slice t writes `x_t W`.
    """
    weight = target.matrices[name].weight
    index = list(places)
    read = dual_directions(rows, moment)[:, index]
    return {name: suppress(weight, read, rows[index].to(weight) @ weight, together)}


def direct_edit(target: Target, name: str, x: Tensor, moment: Tensor) -> Edit:
    """Everything W does along C⁻¹x, for the inputs x `[k, I]`: with orthonormal R spanning them, `R (Rᵀ W)`."""
    read = torch.linalg.solve(moment.double().cpu(), x.double().cpu().t())
    basis = torch.linalg.qr(read)[0]
    return {name: Factors(basis, basis.t() @ target.matrices[name].weight.double().cpu())}


def random_edit(target: Target, name: str, norm: float, count: int, seed: int) -> Edit:
    """`count` random rank-1 directions that together have Frobenius norm `norm`."""
    weight = target.matrices[name].weight
    generator = torch.Generator().manual_seed(seed)
    read = torch.randn(weight.shape[0], count, generator=generator, dtype=torch.float64)
    write = torch.randn(count, weight.shape[1], generator=generator, dtype=torch.float64)
    read = read / read.norm(dim=0)
    return {name: Factors(read, write * (norm / (read @ write).norm()))}


def singular_edit(target: Target, name: str, count: int) -> Edit:
    """The `count` largest singular triples of W."""
    left, values, right = torch.linalg.svd(target.matrices[name].weight.double().cpu(), full_matrices=False)
    return {name: Factors(left[:, :count].contiguous(), values[:count, None] * right[:count])}


def edit_norm(edit: Edit) -> float:
    """Frobenius norm of all that an edit takes away."""
    return sum((factors.read @ factors.write).square().sum().item() for factors in edit.values()) ** 0.5


def optimised_edit(
    target: Target,
    questions: Questions,
    row: int,
    name: str,
    count: int = 1,
    seed: int = 0,
    steps: int = OPTIMISER_STEPS,
) -> Edit:
    """`count` suppressed directions of one matrix, sought by Adam so that question `row` loses its answer.

    Minimises the log-probability of the answer, floored at a hundredth of what it was, plus OTHERS_WEIGHT times the KL
    on the other questions. The directions start at random; what is measured afterwards on text that was not part of
    the search is all that such an edit can be judged by.
    """
    matrix = target.matrices[name]
    weight = matrix.weight.detach()
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(n, count, generator=generator).to(weight).requires_grad_() for n in weight.shape]
    optimiser = torch.optim.Adam(directions, lr=OPTIMISER_RATE)
    clean = clean_pass(target, questions.batch, ())
    bank = Slices(weight.new_zeros(len(weight), count), weight.new_zeros(count, weight.shape[1]))
    slices = SliceSet({name: bank}, delta=True)
    variant = fixed_variant("", {name: weight.new_zeros(count)}, {name: matrix.block}, delta=1.0)
    piece = Piece(variant, 0, len(questions.texts))
    for _ in range(steps):
        factors = _suppression_factors(weight, *directions)
        with torch.no_grad():
            bank.U.copy_(factors[0])
            bank.V.copy_(factors[1])
        slices.zero_grad(set_to_none=True)
        _objective(target, slices, clean, piece, row).backward()
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(factors, [bank.U.grad, bank.V.grad])
        optimiser.step()
    read, write = (one.detach() for one in directions)
    return {name: suppress(weight, read, write.t(), "orthonormal")}  # the form that was sought by


def _suppression_factors(weight: Tensor, read: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """What suppressing the directions `read` `[I, k]` and `write` `[O, k]` takes from W, as factors with a gradient."""
    read, write = (one / one.norm(dim=0) for one in (read, write))
    gram = (read.t() @ read) * (write.t() @ write) + 1e-6 * torch.eye(read.shape[1]).to(weight)
    a = torch.linalg.solve(gram, ((read.t() @ weight) * write.t()).sum(1))
    return read, a[:, None] * write.t()


def _objective(target: Target, slices: SliceSet, clean: Clean, piece: Piece, row: int) -> Tensor:
    """What an optimised edit is sought by: see `optimised_edit`."""
    batch = clean.batch
    assert batch.answers is not None
    hidden = plan_pass(target, slices, clean, [piece], chunk_masks([piece], slices, {}))
    log_q = target.log_probabilities(hidden[batch.looked][row])
    answer = batch.answers[row]
    own = log_q[answer].clamp(min=clean.log_probs[row, answer] + math.log(FLOOR))
    kl = row_divergences(target, clean, [piece], hidden, False)[0]
    others = torch.arange(len(kl), device=kl.device) != row
    return own + OTHERS_WEIGHT * kl[others].sum() / others.sum().clamp(min=1)
