"""Facts drawn by a seed: who is drawn, the rule against brute force, numbers against weights changed by hand."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
from fact_contexts import SETTINGS, UP, context_of, switch
from small_runs import MODEL, spd_here

from spdcli.edits.facts_file import Fact, Facts, Known
from spdcli.errors import SpdError
from spdcli.paper import drawn_edits as module
from spdcli.paper.drawn_edits import DrawnEdit, Reach, about, drawn_edits, measured_edits, slices_by_rule, spares
from spdcli.paper.drawn_facts import count_of, draw_facts
from spdcli.recipe.reading import load_recipe

KNOWN = Known(probability=1e-12, rank=10_000)
NAMES = ("Kobe", "Tiger", "golf", "sport")


def facts():
    texts = [f"{name} plays the sport of golf" for name in (*NAMES, "Kobe Bryant", "the Mona Lisa")]
    return Facts(known=KNOWN, fact=[Fact(category="x", prompt=text, subject=text.split(" plays")[0]) for text in texts])


def test_reach_by_hand():
    reach = Reach.of(torch.tensor([1.0, 0.5, 1.2, 0.9]))
    assert (reach.asked, reach.max) == (4, 0.5)
    assert (reach.median, reach.mean, reach.p99) == pytest.approx((0.15, 0.2, 0.5))
    assert Reach.of(torch.tensor([])) == Reach(asked=0, median=None, mean=None, p99=None, max=None)
    hundred = Reach.of(1 + torch.arange(200.0) / 1000)
    assert hundred.p99 == pytest.approx(0.197, abs=1e-6)


@pytest.mark.parametrize(
    ("others", "median", "mean", "held"),
    [
        (0.09, 0.01, 0.04, True),
        (0.1, 0, 0, False),
        (0, 0.02, 0, False),
        (0, 0, 0.05, False),
        (None, None, None, True),
    ],
)
def test_every_bound_on_others_counts(others, median, mean, held):
    reach = lambda **numbers: Reach(asked=5, **{"median": 0, "mean": 0, "p99": 9.0, "max": 9.0} | numbers)  # noqa: E731
    assert spares(reach(max=others), reach(median=median, mean=mean)) == held


def test_a_fact_is_about_what_is_asked_and_not_what_is_answered():
    texts = ["The capital of Japan is Tokyo", "Sushi comes from Japan", "Japanese is old", "Japan, an island"]
    questions = SimpleNamespace(texts=texts, tokens=[" Tokyo", " Japan", " old", " island"])
    assert about("Japan", questions).tolist() == [True, False, False, True]


def test_the_rule_takes_every_slice_of_the_subjects_tokens_alone(tiny_llama_dir, tmp_path):
    context = context_of(tiny_llama_dir, tmp_path)
    naming = context.naming
    context = module.FactContext(**{**context.__dict__, "naming": [[(1,), (2,)], naming[1]]})
    switch(context, UP, 3, (0, 1))
    switch(context, UP, 4, (0, 2), (0, 4))  # elsewhere in its own prompt, too
    switch(context, UP, 5, (0, 2), (1, 3))  # and in another
    switch(context, UP, 6, (0, 3))  # at no token of the subject
    assert {one.index for one in slices_by_rule(context, 0)} == {3, 4}
    assert {one.matrix for one in slices_by_rule(context, 0)} == {UP}


def test_numbers_are_those_of_changed_weights(tiny_llama_dir, tmp_path):
    context = context_of(tiny_llama_dir, tmp_path)
    switch(context, UP, 3, (0, 2))
    edits, slices = drawn_edits(context, 0, 1e-3)
    assert [one.index for one in slices["rule"]] == [3]
    own = context.decomposition.of(UP)
    lost = (edits["rule"][UP].read @ edits["rule"][UP].write).to(own.U)
    torch.testing.assert_close(lost, 0.8 * own.U[:, 3:4] @ own.V[3:4], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(edits["all of it"][UP].write, edits["rule"][UP].write / 0.8)
    before, rows = measured_edits(context, 0, "Bryant", edits, slices)
    assert set(rows) >= {"rule", "all of it", "projection", "static", "direct", "random"}
    weight = context.target.matrices[UP].weight
    batch = context.prompts.batch

    def answers():
        logits = context.target.model(batch.tokens).logits[batch.looked]
        return logits.softmax(-1).gather(1, batch.answers[:, None])[:, 0]

    with torch.no_grad():
        first, kept = answers(), weight.clone()
        weight.sub_(lost)
        after = answers()
        weight.copy_(kept)
    assert before == pytest.approx(first[0].item(), rel=1e-5)
    assert rows["rule"].own == pytest.approx((after / first)[0].item() - 1, rel=1e-3, abs=1e-7)
    assert rows["rule"].others.max == pytest.approx(abs((after / first)[1].item() - 1), rel=1e-3, abs=1e-7)
    assert (rows["rule"].others.asked, rows["rule"].known.asked, rows["rule"].akin.asked) == (1, 2, 0)
    rule = measured_edits(context, 0, "Tiger", edits, slices)[1]["rule"]
    assert (rule.others.asked, rule.known.asked, rule.akin.asked) == (0, 1, 2)
    assert rule.akin.max == pytest.approx(max(rows["rule"].others.max, rule.akin.max))
    assert rows["random"].norm == pytest.approx(rows["rule"].norm)


def small(folder, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(MODEL)
    return load_recipe(path, [f"target.model={folder}", *SETTINGS])


def test_neither_the_recipes_own_nor_what_was_looked_at_is_drawn(tiny_llama_dir, tmp_path):
    loaded = small(tiny_llama_dir, tmp_path)
    drawn = draw_facts(loaded, facts(), 4)
    expected = [f"{name} plays the sport of golf" for name in NAMES]
    random.Random(0).shuffle(expected)
    assert [fact.prompt for fact in drawn] == expected
    assert [fact.prompt for fact in draw_facts(loaded, facts(), 2, skip=1)] == expected[1:3]
    with pytest.raises(SpdError, match="4 facts that this model knows are left to draw, not 5"):
        draw_facts(loaded, facts(), 5)


def test_a_method_is_counted_over_the_facts_that_it_has_an_edit_of():
    reach = Reach.of(torch.tensor([1.0]))
    common = {"slices": [], "others": reach, "known": reach, "akin": reach, "norm": 1.0, "text": None}
    edit = lambda own, spared: DrawnEdit(own=own, cut=own <= -0.6, spares=spared, spares_tail=own < -0.8, **common)  # noqa: E731
    rows = [
        SimpleNamespace(edits={"rule": edit(own, spared)}) for own, spared in ((-0.9, True), (-0.7, False), (0.2, True))
    ]
    count = count_of("rule", [*rows, SimpleNamespace(edits={})])
    assert (count.edits, count.cut, count.cut_and_spared, count.cut_and_tail_spared) == (3, 2, 1, 1)


def test_the_experiment_from_the_command_line(tiny_llama_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("spdcli.edits.facts_file.load_facts", lambda path=None: facts())
    (tmp_path / "small.toml").write_text(MODEL)
    spd = spd_here(monkeypatch, capsys)
    settings = [
        part for one in [f"target.model={tiny_llama_dir}", *SETTINGS, "slices.distinct=0.3"] for part in ("--set", one)
    ]
    command = ["reproduce", "drawn-facts", "--recipe", tmp_path / "small.toml", "--count", "2", *settings]
    code, out, err = spd(*command, "--out", tmp_path / "out", "--json")
    assert out, err
    data = json.loads(out)
    assert (data["schema"], len(data["facts"])) == ("spd.facts.drawn/1", 2)
    assert code == (0 if data["passed"] else 1), err
    assert json.loads((tmp_path / "out" / "reproduce.json").read_text()) == data
    assert data["methods"][0]["method"] == "rule"
    for fact in data["facts"]:
        assert fact["edits"]["static"]["known"]["asked"] + fact["edits"]["static"]["akin"]["asked"] > 0
