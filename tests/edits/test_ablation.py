"""Ablation against weights and layers that are changed by hand, one model at a time."""

from __future__ import annotations

import pytest
import torch
from edited_models import CASES, answers_of, ask_own, in_place, open_case

from spdcli.edits.ablation import Masking, ablate, draw_masks, without
from spdcli.edits.answer_changes import compare_answers
from spdcli.edits.exam import Exam
from spdcli.edits.suppression import Address
from spdcli.edits.zeroing import MLP_MATRICES, silenced, zeroed_matrix, zeroed_mlp, zeroed_parts
from spdcli.errors import UsageError
from spdcli.targets.architectures import ARCHITECTURES, RESIDUAL


@pytest.mark.parametrize("case", CASES)
def test_ablated_slices_are_subtracted(case, request, tmp_path):
    """With the others and the delta on, the ablated model is the target minus the slices' own `u v`."""
    subject, decomposition, names, tolerance = open_case(case, request, tmp_path, "slices.delta=true")
    questions = ask_own(subject)
    addresses = [Address(name, index) for index, name in enumerate(names)]
    report = ablate(subject, decomposition, Exam(questions), addresses)

    def minus(own):
        for address in own:
            slices = decomposition.of(address.matrix)
            W = subject.target.matrices[address.matrix].weight
            W -= torch.outer(slices.U[:, address.index], slices.V[address.index])

    before = answers_of(subject, questions)
    chosen = {"": addresses} | {str(one): [one] for one in addresses}
    assert list(report.alone) == list(chosen)[1:]
    for name, own in chosen.items():
        after = in_place(subject, questions, lambda own=own: minus(own))
        effects = report.alone[name] if name else report.effects
        for effect, wanted in zip(effects, compare_answers(questions, before, after), strict=True):
            for key in ("before", "after", "kl"):
                assert getattr(effect, key) == pytest.approx(getattr(wanted, key), **tolerance)
            assert effect.target == pytest.approx(effect.before)
            assert effect.kl_target == pytest.approx(effect.kl, **tolerance)


@torch.no_grad()
def by_masks(subject, decomposition, questions, masks, deltas):
    """The answers of the model whose weights are `U diag(mask) V + d (W − U V)`, masks alike at every position."""

    def change():
        for name, mask in masks.items():
            W, own = subject.target.matrices[name].weight, decomposition.of(name)
            W.copy_((own.U * mask) @ own.V + deltas * (W - own.U @ own.V))

    return in_place(subject, questions, change)


@pytest.mark.parametrize("delta", [True, False])
def test_all_kept_is_the_whole_decomposition(delta, request, tmp_path):
    """On, with the delta: the target. Without one: U V, from which `before` starts and `target` does not."""
    subject, decomposition, names, tolerance = open_case(
        "gpt2", request, tmp_path, f"slices.delta={str(delta).lower()}"
    )
    questions = ask_own(subject)
    effects = ablate(subject, decomposition, Exam(questions), [Address(names[0], 2)]).effects
    ones = {name: torch.ones(6, dtype=torch.float64) for name in names}
    whole = by_masks(subject, decomposition, questions, ones, 1.0 if delta else 0.0)
    ones[names[0]][2] = 0
    cut = by_masks(subject, decomposition, questions, ones, 1.0 if delta else 0.0)
    own = answers_of(subject, questions)
    if delta:
        torch.testing.assert_close(whole, own)
    for effect, wanted, far in zip(
        effects, compare_answers(questions, whole, cut), compare_answers(questions, own, cut), strict=True
    ):
        for key in ("before", "after", "kl"):
            assert getattr(effect, key) == pytest.approx(getattr(wanted, key), **tolerance)
        assert (effect.target, effect.kl_target) == (
            pytest.approx(far.before, **tolerance),
            pytest.approx(far.kl, **tolerance),
        )


@pytest.mark.parametrize("others", ["importance", "sampled"])
def test_others_at_their_importance(others, request, tmp_path, monkeypatch):
    """Importances set by hand, alike at every position; sampled, g = 1 leaves no room to draw."""
    subject, decomposition, names, tolerance = open_case("llama", request, tmp_path, "slices.delta=false")
    torch.manual_seed(1)
    g = {
        name: torch.rand(6, dtype=torch.float64) if others == "importance" else torch.ones(6).double() for name in names
    }
    wide = lambda inputs: {n: g[n].expand(*inputs[n].shape[:2], 6) for n in names}  # noqa: E731
    monkeypatch.setattr(decomposition, "importance", lambda inputs, valid=None: (wide(inputs), {}))
    questions = ask_own(subject)
    effects = ablate(subject, decomposition, Exam(questions), [Address(names[1], 4)], (), Masking(others, 3)).effects
    before = by_masks(subject, decomposition, questions, g, 0.0)
    g[names[1]] = g[names[1]].clone().index_fill(0, torch.tensor([4]), 0.0)
    after = by_masks(subject, decomposition, questions, g, 0.0)
    for effect, wanted in zip(effects, compare_answers(questions, before, after), strict=True):
        for key in ("before", "after", "kl"):
            assert getattr(effect, key) == pytest.approx(getattr(wanted, key), **tolerance)


def test_sampled_masks_lie_between_g_and_one(request, tmp_path):
    _, decomposition, names, _ = open_case("gpt2", request, tmp_path, "slices.delta=true")
    g = {name: torch.full((2, 5, 6), 0.75, dtype=torch.float64) for name in names}
    drawn_masks = draw_masks(decomposition, g, 2, Masking("sampled", 40, 3))
    masks = torch.stack([one[names[0]].mask for one in drawn_masks])
    deltas = torch.stack([one[names[0]].delta for one in drawn_masks])
    assert masks.min() >= 0.75
    assert masks.max() <= 1
    assert masks.mean() == pytest.approx(0.875, abs=0.01)  # 2400 draws: a standard error of 0.0015
    assert deltas.mean() == pytest.approx(0.5, abs=0.06)  # 400 draws: 0.0144
    assert len(masks.unique()) > 2000
    cut = without(drawn_masks[0], [Address(names[0], 1)])
    assert not cut[names[0]].mask[..., 1].any()
    assert torch.equal(cut[names[0]].mask[..., 2:], drawn_masks[0][names[0]].mask[..., 2:])
    assert drawn_masks[0][names[0]].mask[..., 1].all()  # not changed


@pytest.mark.parametrize("case", ["gpt2", "split", "llama"])
def test_a_zeroed_mlp_is_a_forward_without_it(case, request, tmp_path, monkeypatch):
    subject, decomposition, _, tolerance = open_case(case, request, tmp_path)
    questions = ask_own(subject)
    off = [zeroed_mlp(subject.target, layer) for layer in (0, 2)]
    report = ablate(subject, decomposition, Exam(questions), [], off)
    before = answers_of(subject, questions)
    for labels in (["mlp 0"], ["mlp 2"], ["mlp 0", "mlp 2"]):
        with monkeypatch.context() as patch:
            for label in labels:
                mlp = subject.target.blocks[int(label[-1])].mlp
                patch.setattr(mlp, "forward", lambda x: torch.zeros_like(x))
            after = answers_of(subject, questions)
        effects = report.effects if len(labels) == 2 else report.alone[labels[0]]
        for effect, wanted in zip(effects, compare_answers(questions, before, after), strict=True):
            for key in ("before", "after", "kl"):
                assert getattr(effect, key) == pytest.approx(getattr(wanted, key), **tolerance)
    torch.testing.assert_close(answers_of(subject, questions), before, rtol=0, atol=0)  # no hook is left


def test_a_toys_mlp_is_its_feed_forward_part(request, tmp_path):
    subject, *_ = open_case("toy", request, tmp_path, "target.feed_forward=true")
    assert zeroed_mlp(subject.target, 1).matrix.name == "Down1"
    plain, *_ = open_case("toy", request, tmp_path)
    with pytest.raises(UsageError, match="no MLP"):
        zeroed_mlp(plain.target, 0)
    for layer in (-1, 2):
        with pytest.raises(UsageError, match="layers 0 to 1"):
            zeroed_mlp(plain.target, layer)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_ends_its_mlp_with_a_matrix_of_that_name(kind):
    """What `zeroed_mlp` relies on: the last matrix named after the MLP is the one that writes for all of it."""
    own = [entry for entry in ARCHITECTURES[kind].matrices if entry.module.startswith(MLP_MATRICES)]
    ends = (RESIDUAL, "post_feedforward_layernorm")
    assert own[-1].writes in ends
    assert all(entry.writes not in ends for entry in own[:-1])


@pytest.mark.parametrize(("case", "name"), [("gpt2", "h.1.attn.c_proj"), ("split", "h.1.attn.c_attn.v"), ("toy", "K0")])
def test_a_zeroed_matrix_keeps_its_bias(case, name, request, tmp_path):
    subject, decomposition, _, tolerance = open_case(case, request, tmp_path)
    questions = ask_own(subject)
    report = ablate(subject, decomposition, Exam(questions), [], [zeroed_matrix(subject.target, name)])
    before = answers_of(subject, questions)
    after = in_place(subject, questions, lambda: subject.target.matrices[name].weight.zero_())
    assert report.alone == {}
    for effect, wanted in zip(report.effects, compare_answers(questions, before, after), strict=True):
        assert effect.after == pytest.approx(wanted.after, **tolerance)
        assert effect.kl == pytest.approx(wanted.kl, **tolerance)


def test_slices_and_an_earlier_mlp_together(request, tmp_path, monkeypatch):
    """The decomposed matrix is in block 2, the zeroed layer in block 0: the model runs from there on."""
    subject, decomposition, names, tolerance = open_case("gpt2", request, tmp_path, "slices.delta=true")
    questions = ask_own(subject)
    last = Address(names[2], 1)
    effects = ablate(subject, decomposition, Exam(questions), [last], [zeroed_mlp(subject.target, 0)]).effects
    before = answers_of(subject, questions)
    own = decomposition.of(last.matrix)

    def change():
        W = subject.target.matrices[last.matrix].weight
        W -= torch.outer(own.U[:, 1], own.V[1])

    monkeypatch.setattr(subject.target.blocks[0].mlp, "forward", lambda x: torch.zeros_like(x))
    after = in_place(subject, questions, change)
    for effect, wanted in zip(effects, compare_answers(questions, before, after), strict=True):
        assert effect.after == pytest.approx(wanted.after, **tolerance)


def test_hooks_go_even_when_the_model_fails(request, tmp_path):
    subject, *_ = open_case("gpt2", request, tmp_path)
    one = zeroed_mlp(subject.target, 0)
    with pytest.raises(RuntimeError, match="boom"), silenced([one]):
        raise RuntimeError("boom")
    assert not one.matrix.module._forward_hooks


def test_parts_are_named_once_each(request, tmp_path):
    subject, *_ = open_case("gpt2", request, tmp_path)
    labels = lambda *parts: [one.label for one in zeroed_parts(subject.target, *parts)]  # noqa: E731
    assert labels(["h.1.mlp.c_fc", "h.1.mlp.c_fc"], ["2", 2, "all"]) == ["h.1.mlp.c_fc", "mlp 2", "mlp 0", "mlp 1"]
    with pytest.raises(UsageError, match="--mlp x: not a layer"):
        zeroed_parts(subject.target, layers=["x"])


def test_nearest_names_are_of_this_target(request, tmp_path):
    subject, *_ = open_case("gpt2", request, tmp_path)
    with pytest.raises(UsageError, match=r"nearest is 'h\.0\.mlp\.c_fc'"):
        zeroed_matrix(subject.target, "h.0.mlp.fc")
