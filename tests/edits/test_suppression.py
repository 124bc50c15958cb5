"""Suppression against weights that are changed by hand, one model copy at a time."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from edited_models import CASES, ask_own, in_place, open_case
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from spdcli.edits.answer_changes import active_on, compare_answers, measure_edits
from spdcli.edits.choices import TOGETHER
from spdcli.edits.prompts_and_answers import given_questions, own_questions
from spdcli.edits.script import ScriptEdit
from spdcli.edits.suppression import (
    Address,
    describe,
    edit_variants,
    find_slices,
    projections,
    subtract,
    suppression,
)
from spdcli.engine.subcomponents import Slices, SliceSet
from spdcli.engine.target import Batch
from spdcli.errors import UsageError
from spdcli.measures.importances import importances_of
from spdcli.records import plain

PROJECTIONS = [way for way in TOGETHER if way != "whole"]


def weight_target(**weights):
    """As much of a target as the mathematics of an edit sees."""
    return SimpleNamespace(matrices={name: SimpleNamespace(weight=weight) for name, weight in weights.items()})


def slice_set(**pairs):
    return SliceSet({name: Slices(U, V) for name, (U, V) in pairs.items()}, delta=True).requires_grad_(False)


def suppressed(W, U, V, index, together="literal"):
    """W after suppressing slices `index`, through the public functions."""
    slices = slice_set(m=(U, V))
    edit = suppression(weight_target(m=W), slices, [Address("m", i) for i in index], together)
    return subtract(W, edit["m"])


def drawn(seed, rows, columns, slices, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    return make(rows, columns), make(rows, slices), make(slices, columns)


# --- the mathematics ---------------------------------------------------------------------------------


def test_one_slice_by_hand():
    """û = (0.6, 0.8), v̂ = (0, 1, 0): ûᵀ W v̂ = 0.6·2 + 0.8·5 = 5.2 goes from the middle column, 0.6 and 0.8 of it."""
    W = torch.tensor([[1.0, 2, 3], [4, 5, 6]], dtype=torch.float64)
    U = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    V = torch.tensor([[0.0, -7, 0]], dtype=torch.float64)
    expected = torch.tensor([[1, 2 - 0.6 * 5.2, 3], [4, 5 - 0.8 * 5.2, 6]], dtype=torch.float64)
    for together in PROJECTIONS:
        torch.testing.assert_close(suppressed(W, U, V, [0], together), expected)
    torch.testing.assert_close(suppressed(W, U, V, [0], "whole"), W - U @ V)


def test_two_overlapping_slices_by_hand():
    """E1 = e1 e1ᵀ and E2 = (e1 + e2)/√2 e1ᵀ span both entries of the first column of I: orthonormal leaves 0 there.

    In sequence E1 takes the 1 first, so that nothing is left for E2 to project but 0; the other way round E2 leaves
    (1/2, -1/2) and E1 then takes the 1/2. Literally both take what they find in I: the 1, and (1/2, 1/2).
    """
    W = torch.eye(2, dtype=torch.float64)
    U = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    V = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    zero = [[0.0, 0.0], [0.0, 1.0]]
    for order in ([0, 1], [1, 0]):
        torch.testing.assert_close(suppressed(W, U, V, order, "orthonormal"), torch.tensor(zero, dtype=torch.float64))
        twice = torch.tensor([[-0.5, 0.0], [-0.5, 1.0]], dtype=torch.float64)
        torch.testing.assert_close(suppressed(W, U, V, order, "literal"), twice)
    torch.testing.assert_close(suppressed(W, U, V, [0, 1], "sequence"), torch.tensor(zero, dtype=torch.float64))
    other = torch.tensor([[0.0, 0.0], [-0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(suppressed(W, U, V, [1, 0], "sequence"), other)


shapes = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), st.integers(0, 10**6))


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_literal_is_the_sum_of_the_paper(shape):
    """By a loop over entries, every projection that of the original weights; it is the default."""
    rows, columns, count, seed = shape
    W, U, V = drawn(seed, rows, columns, count)
    expected = W.tolist()
    for k in range(count):
        u = [x / math.sqrt(sum(y * y for y in U[:, k].tolist())) for x in U[:, k].tolist()]
        v = [x / math.sqrt(sum(y * y for y in V[k].tolist())) for x in V[k].tolist()]
        p = sum(u[i] * W[i, o].item() * v[o] for i in range(rows) for o in range(columns))
        for i in range(rows):
            for o in range(columns):
                expected[i][o] -= p * u[i] * v[o]
    cut = suppression(weight_target(m=W), slice_set(m=(U, V)), [Address("m", k) for k in range(count)])
    torch.testing.assert_close(subtract(W, cut["m"]), torch.tensor(expected, dtype=W.dtype), rtol=1e-9, atol=1e-9)
    assert ScriptEdit.model_fields["together"].default == "literal"


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_whole_is_what_the_slices_are(shape):
    """W loses the sum of u_k v_kᵀ, however long u_k and v_k are."""
    rows, columns, count, seed = shape
    W, U, V = drawn(seed, rows, columns, count)
    cut = suppressed(W, U * 3, V, range(0, count, 2), "whole")
    torch.testing.assert_close(cut, W - 3 * U[:, ::2] @ V[::2], rtol=1e-9, atol=1e-9)


def test_strength_is_the_share_that_is_taken():
    W, U, V = drawn(4, 6, 5, 3)
    target, slices, addresses = weight_target(m=W), slice_set(m=(U, V)), [Address("m", 0), Address("m", 2)]
    for together in TOGETHER:
        whole = suppression(target, slices, addresses, together)["m"]
        part = suppression(target, slices, addresses, together, 0.3)["m"]
        torch.testing.assert_close(part.read @ part.write, 0.3 * whole.read @ whole.write)


def test_a_whole_dual_slice_leaves_nothing_of_its_input():
    """A slice that reads x as 1 and writes x W: taken out whole, x gives 0; its projection leaves a part."""
    W, x, _ = drawn(3, 6, 4, 1)
    row = x.t()
    u, v = row.t() / row.square().sum(), row @ W
    torch.testing.assert_close(row @ suppressed(W, u, v, [0], "whole"), torch.zeros(1, 4, dtype=W.dtype))
    slanted = u + torch.linalg.svd(row)[2][-1:].t()  # reads x as 1, too
    torch.testing.assert_close(row @ suppressed(W, slanted, v, [0], "whole"), torch.zeros(1, 4, dtype=W.dtype))
    assert (row @ suppressed(W, slanted, v, [0], "literal")).norm() > 0.1 * v.norm()


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_sequence_is_a_loop_over_what_is_left(shape):
    rows, columns, count, seed = shape
    W, U, V = drawn(seed, rows, columns, count)
    expected = W.clone()
    for u, v in zip(U.t(), V, strict=True):
        u, v = u / u.norm(), v / v.norm()
        expected = expected - (u @ expected @ v) * torch.outer(u, v)
    torch.testing.assert_close(suppressed(W, U, V, range(count), "sequence"), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_orthonormal_is_the_projection_on_the_span(shape):
    """Independently: the dictionary as vectors, made orthonormal by an SVD."""
    rows, columns, count, seed = shape
    W, U, V = drawn(seed, rows, columns, count)
    dictionary = torch.stack([torch.outer(u, v).flatten() for u, v in zip(U.t(), V, strict=True)], dim=1)
    basis, values, _ = torch.linalg.svd(dictionary, full_matrices=False)
    basis = basis[:, values > 1e-7 * values[0]]
    expected = W - (basis @ (basis.t() @ W.flatten())).view_as(W)
    once = suppressed(W, U, V, range(count), "orthonormal")
    torch.testing.assert_close(once, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(suppressed(W, U, V, reversed(range(count)), "orthonormal"), once, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(suppressed(once, U, V, range(count), "orthonormal"), once, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("together", PROJECTIONS)
@pytest.mark.parametrize("apart", ["reads", "writes"])
def test_orthogonal_slices_are_suppressed_alike(apart, together):
    """Orthogonal reads or orthogonal writes are enough: <E_j, E_k> is their product."""
    W, U, V = drawn(6, 6, 5, 3)
    if apart == "reads":
        U = torch.linalg.qr(U)[0]
    else:
        V = torch.linalg.qr(V.t())[0].t()
    torch.testing.assert_close(suppressed(W, U, V, [1, 2, 0], together), suppressed(W, U, V, [0, 1, 2], "literal"))
    W, U, V = drawn(6, 6, 5, 3)
    if together != "literal":
        assert (suppressed(W, U, V, [0, 1, 2], together) - suppressed(W, U, V, [0, 1, 2])).norm() > 0.1


@pytest.mark.parametrize("together", PROJECTIONS)
def test_a_projection_is_gone_afterwards(together):
    W, U, V = drawn(1, 6, 5, 3)
    after = suppressed(W, U, V, [2, 0, 1], together)
    left = projections(after, U / U.norm(dim=0), V / V.norm(dim=1, keepdim=True)).abs()
    assert (left[1] < 1e-12) == (together != "literal")  # the last of the sequence
    assert (left.max() < 1e-12) == (together == "orthonormal")


def test_equal_directions_count_once():
    """A slice and its multiple, or its opposite: one direction, which only the literal sum takes twice."""
    W, U, V = drawn(2, 6, 5, 1)
    twice = torch.cat([U, -3 * U], dim=1), torch.cat([V, 2 * V])
    once = suppressed(W, U, V, [0])
    for together in PROJECTIONS:
        expected = 2 * once - W if together == "literal" else once
        torch.testing.assert_close(suppressed(W, *twice, [0, 1], together), expected)


def test_description_adds_up():
    W, U, V = drawn(3, 6, 5, 3)
    target, slices = weight_target(m=W), slice_set(m=(U, V))
    addresses = [Address("m", 2), Address("m", 0)]
    share = lambda change: pytest.approx((change.norm() / W.norm()).item(), abs=1e-12)  # noqa: E731
    after = {together: suppressed(W, U, V, [2, 0], together) for together in TOGETHER}
    for together in TOGETHER:
        (cut,) = describe(target, slices, addresses, suppression(target, slices, addresses, together))
        assert cut.slices == ["m:2", "m:0"]
        assert cut.removed == share(W - after[together])
        assert cut.difference == share(after["sequence"] - after["orthonormal"])
        assert cut.difference > 1e-4
        assert cut.projections[0] == pytest.approx((U[:, 2] @ W @ V[2] / U[:, 2].norm() / V[2].norm()).item())
        assert list(cut.forms) == list(TOGETHER)
        for form, sizes in cut.forms.items():
            assert sizes.removed == share(W - after[form])
            assert sizes.from_literal == share(after[form] - after["literal"])


def test_the_paper_is_one_of_four_ways():
    assert list(TOGETHER) == ["literal", "orthonormal", "sequence", "whole"]


def test_a_zero_slice_has_no_direction():
    W, U, V = drawn(4, 4, 4, 2)
    V[1] = 0
    with pytest.raises(UsageError, match="m:1 is zero"):
        suppressed(W, U, V, [0, 1])


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("h.0.mlp.c_fd:1", "the run decomposes no matrix 'h.0.mlp.c_fd'; the nearest is 'h.0.mlp.c_fc'"),
        ("h.0.mlp.c_fc:2", "h.0.mlp.c_fc has the slices 0 to 1"),
        ("h.0.mlp.c_fc:-1", "h.0.mlp.c_fc has the slices 0 to 1"),
        ("h.0.mlp.c_fc", "'h.0.mlp.c_fc' is no slice"),
        (":1", "':1' is no slice"),
        ("", "'' is no slice"),
    ],
)
def test_addresses_that_are_none(address, said):
    _, U, V = drawn(5, 4, 4, 2)
    slices = SliceSet({"h.0.mlp.c_fc": Slices(U, V), "h.1.attn.c_attn.q": Slices(U, V)}, delta=False)
    with pytest.raises(UsageError) as error:
        find_slices(slices, [address])
    assert said in error.value.message
    assert "\n" not in error.value.message
    found = find_slices(slices, ["h.1.attn.c_attn.q:1", "h.0.mlp.c_fc:0", "h.1.attn.c_attn.q:1"])
    assert [str(one) for one in found] == ["h.1.attn.c_attn.q:1", "h.0.mlp.c_fc:0"]


# --- effects through the plan, against weights edited in place ------------------------------------------


def cut_in_place(subject, decomposition, addresses):
    """The paper's loop on the module's own weight, for slices of different matrices."""

    def change():
        for address in addresses:
            W, own = subject.target.matrices[address.matrix].weight, decomposition.of(address.matrix)
            u, v = own.U[:, address.index], own.V[address.index]
            u, v = u / u.norm(), v / v.norm()
            W -= (u @ W @ v) * torch.outer(u, v)

    return change


@pytest.mark.parametrize("case", CASES)
def test_effects_equal_those_of_edited_weights(case, request, tmp_path):
    subject, decomposition, names, tolerance = open_case(case, request, tmp_path)
    questions = ask_own(subject)
    addresses = [Address(name, index) for index, name in enumerate(names)]
    edits = {"all": suppression(subject.target, decomposition, addresses)}
    edits |= {str(one): suppression(subject.target, decomposition, [one]) for one in addresses}
    measured = measure_edits(subject.target, questions, edits)
    before = in_place(subject, questions, lambda: None)
    chosen = {"all": addresses} | {str(one): [one] for one in addresses}
    for name, own in chosen.items():
        after = in_place(subject, questions, cut_in_place(subject, decomposition, own))
        expected = compare_answers(questions, before, after)
        assert max(effect.kl for effect in expected) > 1e-4  # something to see
        for effect, wanted in zip(measured[name], expected, strict=True):
            for key in ("before", "after", "ratio", "kl"):
                assert getattr(effect, key) == pytest.approx(getattr(wanted, key), **tolerance), (name, key)
            assert (effect.rank_before, effect.rank_after) == (wanted.rank_before, wanted.rank_after)


def test_an_edit_is_held_once_a_matrix(tiny_gpt2_dir, request, tmp_path):
    subject, decomposition, names, _ = open_case("gpt2", request, tmp_path)
    edit = suppression(subject.target, decomposition, [Address(names[0], 0), Address(names[0], 3)])
    slices, variants = edit_variants(subject.target, {"a": edit, "b": edit})
    assert slices.of(names[0]).U.shape[1] == 4
    assert [variant.fixed[names[0]].tolist() for variant in variants] == [[0, 0, 1, 1], [1, 1, 0, 0]]


def test_compare_answers_by_hand():
    batch = Batch(torch.tensor([[0]]), torch.tensor([[True]]), torch.tensor([[True]]), torch.tensor([1]))
    questions = SimpleNamespace(batch=batch, texts=["x"], tokens=["y"], group="prompt")
    before, after = torch.tensor([[0.25, 0.5, 0.25]]), torch.tensor([[0.5, 0.125, 0.375]])
    (effect,) = compare_answers(questions, before.log(), after.log())
    kl = 0.25 * torch.tensor(0.5).log() + 0.5 * torch.tensor(4.0).log() + 0.25 * torch.tensor(2 / 3).log()
    assert plain(effect) == {
        "group": "prompt",
        "prompt": "x",
        "token": "y",
        "before": pytest.approx(0.5),
        "after": pytest.approx(0.125),
        "ratio": pytest.approx(0.25),
        "rank_before": 1,
        "rank_after": 3,
        "kl": pytest.approx(kl.item()),
    }


# --- questions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", ["held_out", "fed"])
def test_own_prompts_ask_for_their_last_token(answers, request, tmp_path):
    subject, *_ = open_case("gpt2", request, tmp_path, f"data.answers='{answers}'")
    questions = own_questions(subject, 1, 0)
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("tiny_gpt2_dir"))
    for row, text in enumerate(questions.texts):
        ids = tokenizer(text)["input_ids"]
        assert questions.batch.looked[row].nonzero().flatten().tolist() == [len(ids) - 2]
        assert questions.batch.answers[row] == ids[-1]
    assert questions.tokens == [" basketball", " golf"]


def test_toy_prompts_ask_for_m(request, tmp_path):
    subject, *_ = open_case("toy", request, tmp_path)
    questions = given_questions(subject, ["3 s 4 1 s", "s 2 1 1 s"])
    assert questions.tokens == ["4", "2"]
    assert questions.batch.looked.nonzero().tolist() == [[0, 4], [1, 4]]
    for text in ("1 2 3", "1 2 s", "1 s s", "s 1 2", "s 1 s 2 s", "1 s 2 s 3 4 5 1 s", "1 9 s"):
        with pytest.raises(UsageError):
            given_questions(subject, [text])
    with pytest.raises(UsageError, match="of one length"):
        given_questions(subject, ["s 1 s", "s 1 2 s"])


def test_active_slices_of_a_prompt(request, tmp_path):
    subject, decomposition, names, _ = open_case("gpt2", request, tmp_path)
    questions = ask_own(subject)
    addresses = [Address(name, index) for name in names for index in range(6)]
    g, _ = importances_of(subject, decomposition, questions.batch)
    found = active_on(subject, decomposition, questions, addresses)
    for row, active in enumerate(found):
        real = questions.batch.valid[row]
        assert active == [str(a) for a in addresses if (g[a.matrix][row][real][:, a.index] > 0).any()]


def test_order_does_not_matter_for_the_model(request, tmp_path):
    """Three slices of one matrix, in every order: the same answers, those of the edited model in transformers."""
    subject, decomposition, names, tolerance = open_case("gpt2", request, tmp_path)
    questions = ask_own(subject)
    edits = {
        str(order): suppression(subject.target, decomposition, [Address(names[0], i) for i in order])
        for order in itertools.permutations([0, 2, 5])
    }
    measured = list(measure_edits(subject.target, questions, edits).values())
    for effects in measured[1:]:
        for effect, first in zip(effects, measured[0], strict=True):
            assert effect.after == pytest.approx(first.after, **tolerance)
    fresh = AutoModelForCausalLM.from_pretrained(request.getfixturevalue("tiny_gpt2_dir"), dtype=torch.float64).eval()
    W = fresh.transformer.get_submodule(names[0]).weight
    with torch.no_grad():
        W.copy_(subtract(W, next(iter(edits.values()))[names[0]]))
        for row, effect in enumerate(measured[0]):
            tokens = questions.batch.tokens[row][questions.batch.valid[row]][None]
            p = fresh(tokens).logits[0, -1].softmax(-1)[questions.batch.answers[row]].item()
            assert effect.after == pytest.approx(p, rel=1e-9)
