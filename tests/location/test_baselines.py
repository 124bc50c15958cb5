"""The baselines of a decomposition against weights that are changed by hand, and an optimised edit that cuts."""

from __future__ import annotations

import pytest
import torch
from small_runs import model_recipe
from twins import close, exact_norm

from spdcli.edits.answer_changes import measure_edits
from spdcli.edits.prompts_and_answers import own_questions
from spdcli.edits.suppression import Address, suppression
from spdcli.engine.forward import clean_pass
from spdcli.engine.subcomponents import Slices, SliceSet, start_slices
from spdcli.engine.variants import Piece, fixed_variant
from spdcli.location.baselines import (
    _objective,
    _suppression_factors,
    direct_edit,
    edit_norm,
    optimised_edit,
    random_edit,
    singular_edit,
    static_duals,
    suppress,
)
from spdcli.runs.subject import language_subject

NAME = "layers.1.mlp.up_proj"


@pytest.fixture
def subject(tiny_llama_dir, tmp_path):
    recipe = model_recipe(tiny_llama_dir, "target.dtype='float64'", "slices.matrices=['*']", folder=tmp_path)
    made = language_subject(recipe, torch.device("cpu"))
    for module in made.target.model.modules():
        if hasattr(module, "variance_epsilon"):  # the Llama family rounds to float32 here
            module.forward = exact_norm(module)
    return made


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, seed=3):
    made = random(2 * size, size, seed=seed)
    return made.t() @ made / (2 * size)


def taken(edit):
    (factors,) = edit.values()
    return factors.read @ factors.write


def test_one_suppression_factors_direction_by_hand():
    weight, read, write = random(5, 7), random(5, 1, seed=1), random(1, 7, seed=2)
    u, v = read[:, 0] / read.norm(), write[0] / write.norm()
    factors = suppress(weight, 3 * read, write / 5)  # lengths do not matter
    close(factors.read @ factors.write, (u @ weight @ v) * torch.outer(u, v))


def test_static_duals_are_the_untrained_slices_of_a_dual_start(subject):
    weight = subject.target.matrices[NAME].weight
    rows, generic = random(4, 32, seed=5), moment(32)
    for given, start in ((None, "dual"), (generic, "dual_whitened")):
        matrices = {NAME: subject.target.matrices[NAME]}
        moments = None if given is None else {NAME: given}
        slices = SliceSet(start_slices(matrices, 6, start, {NAME: rows}, 0, moments), delta=True)
        edit = static_duals(subject.target, NAME, rows, [2, 0], given)
        expected = suppression(subject.target, slices, [Address(NAME, 2), Address(NAME, 0)])
        close(taken(edit), taken(expected), 1e-6)
    assert (weight - taken(edit)).norm() < weight.norm()


def test_a_direct_edit_takes_all_that_is_done_along_its_directions(subject):
    weight, generic = subject.target.matrices[NAME].weight, moment(32)
    x = random(2, 32, seed=6)
    left = weight - taken(direct_edit(subject.target, NAME, x, generic))
    read = torch.linalg.inv(generic) @ x.t()
    assert (read.t() @ left).abs().max() < 1e-9 * (read.t() @ weight).abs().max()
    # What is orthogonal to both directions is read as before.
    basis = torch.linalg.qr(read)[0]
    other = random(32, 1, seed=7)
    other = other - basis @ (basis.t() @ other)
    close(other.t() @ left, other.t() @ weight)
    close(left, weight - basis @ basis.t() @ weight)


@pytest.mark.parametrize("count", [1, 3])
def test_random_edits_have_their_norm_and_rank(subject, count):
    edit = random_edit(subject.target, NAME, 2.5, count, seed=4)
    assert edit_norm(edit) == pytest.approx(2.5)
    assert torch.linalg.matrix_rank(taken(edit)) == count
    close(taken(edit), taken(random_edit(subject.target, NAME, 2.5, count, seed=4)))
    assert not torch.equal(taken(edit), taken(random_edit(subject.target, NAME, 2.5, count, seed=5)))


@pytest.mark.parametrize("count", [1, 4])
def test_a_singular_edit_leaves_the_smaller_singular_values(subject, count):
    weight = subject.target.matrices[NAME].weight
    left = weight - taken(singular_edit(subject.target, NAME, count))
    expected = torch.linalg.svdvals(weight)
    expected[:count] = 0
    close(torch.linalg.svdvals(left), expected.sort(descending=True).values, 1e-9)


@pytest.mark.parametrize("count", [1, 2])
def test_an_optimised_edit_takes_its_answer_and_leaves_the_other(subject, count):
    questions = own_questions(subject, 1, 0)
    edits = {row: optimised_edit(subject.target, questions, row, NAME, count, steps=60) for row in (0, 1)}
    for row, edit in edits.items():
        assert torch.linalg.matrix_rank(taken(edit)) == count
        again = optimised_edit(subject.target, questions, row, NAME, count, steps=60)
        close(taken(again), taken(edit))
        effects = measure_edits(subject.target, questions, {"": edit})[""]
        random_one = random_edit(subject.target, NAME, edit_norm(edit), count, seed=1)
        control = measure_edits(subject.target, questions, {"": random_one})[""]
        assert effects[row].ratio < 0.5 * control[row].ratio
        assert effects[1 - row].kl < 0.2 * effects[row].kl


def test_an_optimised_edit_follows_the_gradient_of_its_whole_objective(subject):
    """One step of plain differences along the first direction says the same as the engine's gradient."""
    target, questions = subject.target, own_questions(subject, 1, 0)
    weight = target.matrices[NAME].weight
    clean = clean_pass(target, questions.batch, ())
    drawn = [random(32, 1, seed=8).requires_grad_(), random(48, 1, seed=9).requires_grad_()]

    def value(read, write):
        U, V = _suppression_factors(weight, read, write)
        slices = SliceSet({NAME: Slices(U.detach(), V.detach())}, delta=True)
        piece = Piece(fixed_variant("", {NAME: weight.new_zeros(1)}, {NAME: 1}, delta=1.0), 0, 2)
        return _objective(target, slices, clean, piece, 0), slices, (U, V)

    loss, slices, factors = value(*drawn)
    loss.backward()
    bank = slices.of(NAME)
    torch.autograd.backward(factors, [bank.U.grad, bank.V.grad])
    step = 1e-5
    for which in (0, 1):
        direction = random(*drawn[which].shape, seed=10)
        moved = [[d.detach().clone() for d in drawn] for _ in range(2)]
        moved[0][which] += step * direction
        moved[1][which] -= step * direction
        slope = (value(*moved[0])[0] - value(*moved[1])[0]).item() / (2 * step)
        assert slope == pytest.approx((drawn[which].grad * direction).sum().item(), rel=1e-4)
