"""Slices chosen by rule, against loops over prompts, positions and slices, and by gates that were set by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from edited_models import in_place
from planted_gates import FC, PROJ, plant_gates

from spdcli.edits.choices import ORDERS
from spdcli.edits.prompts_and_answers import pick
from spdcli.edits.selection import (
    Activity,
    Rule,
    active_at,
    by_effect,
    in_order,
    own_activity,
    select,
    weight_carried,
    with_direction,
    written_amounts,
)
from spdcli.edits.suppression import Address, suppression, suppressions
from spdcli.engine.subcomponents import Slices, SliceSet
from spdcli.engine.target import Batch
from spdcli.errors import UsageError
from spdcli.measures.texts import Texts, find_prompt


@pytest.fixture(scope="module")
def planted(tiny_gpt2_dir, tmp_path_factory):
    subject, decomposition, _ = plant_gates(tiny_gpt2_dir, tmp_path_factory.mktemp("planted"))
    activity, questions = own_activity(subject, decomposition, 0)
    return subject, decomposition, activity, questions


def chosen(planted, **rule):
    return [str(address) for address in select(*planted, Rule(**{"row": 0, "token": "Bryant"} | rule))]


def random_activity(seed):
    """Importances that are 0 most of the time, on 3 prompts of 5, 2 and 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 2, 4])
    valid = torch.arange(5) < lengths[:, None]
    g, inner = {}, {}
    for name, slices in (("a", 9), ("b", 4)):
        drawn = torch.rand(3, 5, slices, generator=generator)
        g[name] = torch.where(drawn > 0.7, drawn, 0.0) * valid[..., None]
        inner[name] = torch.randn(3, 5, slices, generator=generator)
    texts = Texts(Batch(valid.long(), valid, valid), ["x", "y", "z"], [], lambda query: [])
    return Activity(texts, g, inner)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("unique", "only_at"), list(itertools.product([True, False], repeat=2)))
def test_active_at_is_the_loop_that_one_would_write(seed, unique, only_at):
    activity = random_activity(seed)
    found_some = False
    for row, positions, threshold in itertools.product(range(3), ([0], [1], [0, 1]), (0.0, 0.85)):
        found = active_at(activity, row, positions, threshold, unique, only_at)
        for name, g in activity.g.items():
            for c in range(g.shape[2]):
                here = any(g[row, t, c] > threshold for t in positions)
                others = any(g[b, t, c] > threshold for b in range(3) for t in range(5) if b != row)
                own = any(g[row, t, c] > threshold for t in range(5) if t not in positions)
                wanted = here and not (unique and others) and not (only_at and own)
                assert bool(found[name][c]) == wanted
                found_some |= wanted
    assert found_some


def test_scores_by_hand():
    slices = SliceSet(
        {"m": Slices(torch.tensor([[2.0, 0, 1], [0, 0, 1]]), torch.tensor([[0.0, 3], [1, 0], [4, 0]]))}, delta=True
    )
    activity = random_activity(0)
    inner = torch.tensor([[[1.0, 5, -2], [-3, 5, 1]]])
    activity = Activity(activity.texts, {"m": inner.abs()}, {"m": inner})
    assert written_amounts(slices, activity, 0, [0, 1])["m"].tolist() == [9, 5, 8]
    assert written_amounts(slices, activity, 0, [1])["m"].tolist() == [9, 5, 4]
    matrix = type("Matrix", (), {"weight": torch.tensor([[1.0, 2], [3, 4]])})
    target = type("Target", (), {"matrices": {"m": matrix}})
    # (1, 0) W (0, 1) = 2; a slice without direction is 0; (1, 1)/√2 W (1, 0) = 4/√2
    torch.testing.assert_close(weight_carried(target, slices, ["m"])["m"], torch.tensor([2, 0, 4 / 2**0.5]))
    alive = with_direction(slices, {"m": torch.tensor([True, True, False])})
    assert alive["m"].tolist() == [True, False, False]


def test_later_scores_settle_ties():
    found = {"a": torch.tensor([True, True, False, True]), "b": torch.tensor([True, True])}
    first = {"a": torch.tensor([1.0, 1.0, 9.0, 0.5]), "b": torch.tensor([0.5, 1.0])}
    second = {"a": torch.tensor([1.0, 3.0, 9.0, 1.0]), "b": torch.tensor([2.0, 2.0])}
    assert [str(one) for one in in_order(found, [first, second])] == ["a:1", "b:1", "a:0", "b:0", "a:3"]
    assert in_order({"a": torch.zeros(2, dtype=torch.bool)}, [{"a": torch.zeros(2)}]) == []


def test_the_planted_slices_are_found(planted):
    assert set(chosen(planted)) == {f"{FC}:0", f"{PROJ}:1", f"{PROJ}:4"}
    assert set(chosen(planted, only_at=True)) == {f"{FC}:0", f"{PROJ}:4"}, "PROJ:1 is active at another token too"
    assert set(chosen(planted, unique=False, matrices=("*c_fc",))) == {f"{FC}:0", f"{FC}:1", f"{FC}:3"}
    assert chosen(planted, unique=False, matrices=("*c_fc",), threshold=0.45) == [f"{FC}:0", f"{FC}:1"]
    assert chosen(planted, matrices=("*c_fc",), top=5) == [f"{FC}:0"]
    assert chosen(planted, row=1, token=" of", matrices=(FC,)) == [f"{FC}:2"]


@pytest.mark.parametrize("by", ORDERS)
def test_an_order_is_that_of_its_number(planted, by):
    subject, decomposition, activity, questions = planted
    found = select(*planted, Rule(0, "Bryant", unique=False, by=by))
    assert len(found) == 5
    place = (0, 2)

    def amount(one):
        own = decomposition.of(one.matrix)
        u, v = own.U[:, one.index], own.V[one.index]
        W = subject.target.matrices[one.matrix].weight
        size = (activity.inner[one.matrix][place][one.index].abs() * v.norm()).item()
        if by == "importance":
            return (activity.g[one.matrix][place][one.index].item(), size)
        if by == "written":
            return size
        if by == "weight":
            return ((u / u.norm()) @ W @ (v / v.norm())).abs().item()

        def cut():
            W.sub_((u / u.norm()) @ W @ (v / v.norm()) * torch.outer(u / u.norm(), v / v.norm()))

        return -in_place(subject, questions, cut)[0, questions.batch.answers[0]].item()

    amounts = [amount(one) for one in found]
    assert amounts == sorted(amounts, reverse=True)
    assert len(set(amounts)) == len(amounts)
    assert chosen(planted, unique=False, by=by, top=2) == [str(one) for one in found[:2]]


def test_edits_of_single_slices_are_made_together_or_apart(planted):
    subject, decomposition, _, questions = planted
    addresses = [Address(PROJ, 4), Address(FC, 0), Address(PROJ, 1)]
    together = suppressions(subject.target, decomposition, addresses)
    assert list(together) == [str(one) for one in addresses]
    for one in addresses:
        apart = suppression(subject.target, decomposition, [one])
        for name in apart:
            torch.testing.assert_close(together[str(one)][name].read, apart[name].read)
            torch.testing.assert_close(together[str(one)][name].write, apart[name].write, rtol=1e-10, atol=1e-12)
    falls = by_effect(subject.target, decomposition, pick(questions, [0]), addresses)
    assert {one for one, _ in falls} == set(addresses)
    assert [fall for _, fall in falls] == sorted(fall for _, fall in falls)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"token": "golf"}, "no prompt has the token 'golf'|only an answer"),
        ({"token": " of"}, "prompt 1 has no token ' of'"),
        ({"matrices": ("h.9.*",)}, "no decomposed matrix matches 'h.9.*'"),
        ({"token": " plays"}, "no slice of these matrices is active only there at ' plays' in prompt 1"),
        ({"token": " plays", "unique": False, "threshold": 0.9}, "no slice of these matrices is active at"),
    ],
)
def test_what_is_not_there_is_told(planted, rule, said):
    with pytest.raises(UsageError, match=said):
        chosen(planted, **rule)


def test_prompts_by_number_and_text():
    texts = ["one two", "three"]
    assert [find_prompt(texts, wanted) for wanted in (1, 2, "three")] == [0, 1, 1]
    for wanted, said in ((0, "1 to 2"), (3, "1 to 2"), ("two", "none of the run's prompts")):
        with pytest.raises(UsageError, match=said):
            find_prompt(texts, wanted)
