"""The table of facts: choices by rule and by effect against brute force, numbers against weights changed by hand."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from fact_contexts import DOWN, FACTS, GATE, SETTINGS, SUBJECTS, UP, context_of, switch
from small_runs import MODEL, one_line, spd_here

from spdcli.edits import facts_file as facts_module
from spdcli.edits.facts_file import Known
from spdcli.edits.suppression import find_slices, suppression
from spdcli.errors import SpdError, UsageError
from spdcli.location.fact_edits import METHODS, fact_edits, most_important_at, slices_by_effect, slices_by_rule
from spdcli.paper import fact_claims as fact_bounds
from spdcli.paper.fact_claims import PAIRS, Pair, fact_claims, method_rows
from spdcli.paper.fact_table import fact_table, open_table
from spdcli.paper.verdict import judge
from spdcli.recipe.reading import load_recipe
from spdcli.records import plain
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import language_subject


def test_the_rule_takes_the_subjects_own_slice_of_which_the_weights_hold_most(tiny_llama_dir, tmp_path):
    context = context_of(tiny_llama_dir, tmp_path)
    assert context.prompts.texts[0].startswith("Kobe Bryant")  # K, obe, Bryant: the subject's last token is at 2
    assert slices_by_rule(context, 0) == {}
    switch(context, UP, 1, (0, 1))  # another token
    switch(context, UP, 2, (0, 2), (1, 1))  # the other prompt too
    switch(context, DOWN, 3, (0, 2))  # another matrix
    assert slices_by_rule(context, 0) == {}
    for index in (5, 6, 7):
        switch(context, UP, index, (0, 2), importance=0.1 * index)
    switch(context, UP, 6, (0, 3))  # elsewhere in the same prompt: that is allowed
    own, weight = context.decomposition.of(UP), context.subject.target.matrices[UP].weight
    sizes = {c: abs((own.U[:, c] @ weight @ own.V[c] / own.U[:, c].norm() / own.V[c].norm()).item()) for c in (5, 6, 7)}
    assert [str(address) for address in slices_by_rule(context, 0)] == [f"{UP}:{max(sizes, key=sizes.get)}"]
    assert most_important_at(context, 0, list(slices_by_rule(context, 0))) == [2]
    assert slices_by_rule(context, 1) == {}


def test_the_choice_by_effect_is_the_best_of_all_singles_and_pairs(tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("spdcli.edits.selection.SPARED", 0.4)
    context = context_of(tiny_llama_dir, tmp_path)
    active = [(UP, 1), (UP, 2), (GATE, 3), (DOWN, 2), (DOWN, 4)]
    for name, index in active:
        switch(context, name, index, (0, index))
    switch(context, UP, 7, (1, 2))  # not active in the first prompt
    switch(context, UP, 0, (0, 0), (0, 1))  # active at a first token
    switch(context, "layers.1.mlp.up_proj", 1, (0, 1))  # not in the first MLP
    chosen = slices_by_effect(context, 0)
    everything = [address for address in every(context) if (address.matrix, address.index) in active]
    best, choice = math.inf, None
    for count in (1, 2):
        for slices in itertools.combinations(everything, count):
            own, other = answers(context, suppression(context.subject.target, context.decomposition, list(slices)))
            if abs(other - 1) < 0.4 and own < best:
                best, choice = own, slices
    assert set(chosen) == set(choice)


def every(context):
    return find_slices(context.decomposition, [f"{n}:{c}" for n in (UP, GATE, DOWN) for c in range(16)])


def answers(context, edit, questions=None):
    """after / before of every question's answer, with the weights changed by hand and no padding."""
    questions = questions or context.prompts
    target = context.subject.target

    def probabilities():
        found = []
        for row in range(len(questions.texts)):
            tokens = questions.batch.tokens[row][questions.batch.valid[row]][None]
            hidden = target.run(tokens).last_hidden_state[0, -1]
            found.append((target.unembedding @ hidden).softmax(-1)[questions.batch.answers[row]].item())
        return found

    before = probabilities()
    kept = {name: target.matrices[name].module.weight.data.clone() for name in edit}
    for name, factors in edit.items():
        target.matrices[name].module.weight.data -= (factors.read @ factors.write).t()
    after = probabilities()
    for name, weight in kept.items():
        target.matrices[name].module.weight.data = weight
    return [b / a for a, b in zip(before, after, strict=True)]


def test_every_number_of_the_table_against_weights_changed_by_hand(tiny_llama_dir, tmp_path):
    context = context_of(tiny_llama_dir, tmp_path)
    switch(context, UP, 1, (0, 1))
    switch(context, UP, 2, (0, 2))
    table = plain(fact_table(context))
    assert [entry["prompt"] for entry in table] == context.prompts.texts
    assert table[1]["edits"] == {}  # nothing is active there
    assert list(table[0]["edits"]) == list(METHODS)
    assert table[0]["edits"]["rule"]["slices"] == [f"{UP}:2"]
    for method, edit in fact_edits(context, 0).edits.items():
        found = table[0]["edits"][method]
        own, other = answers(context, edit)
        assert found["own"] == pytest.approx(own - 1, rel=1e-6)
        assert found["others"] == pytest.approx(abs(other - 1), rel=1e-6, abs=1e-9)
        changes = [abs(ratio - 1) for ratio in answers(context, edit, context.known.questions)]
        assert found["median_relative_change"] == pytest.approx(sum(changes) / 2, rel=1e-6, abs=1e-9)
        assert found["max_relative_change"] == pytest.approx(max(changes), rel=1e-6, abs=1e-9)
        assert found["worst"]["prompt"] == context.known.questions.texts[changes.index(max(changes))]
        assert found["known"] == 2
        assert (found["slices"] is None) == (method not in ("rule", "effect"))
        if method not in ("rule", "effect"):
            assert list(edit) == [UP]
            assert torch.linalg.matrix_rank(edit[UP].read @ edit[UP].write) == 1
    # Untrained slices are the static duals: training is what the two differ by.
    assert table[0]["edits"]["static"]["own"] == pytest.approx(table[0]["edits"]["rule"]["own"], rel=1e-5)
    assert table[0]["edits"]["random"]["norm"] == pytest.approx(table[0]["edits"]["rule"]["norm"])


def test_what_a_table_cannot_be_made_of(tiny_llama_dir, tmp_path):
    with pytest.raises(SpdError, match="knows none of the facts"):
        context_of(tiny_llama_dir, tmp_path, facts=FACTS.model_copy(update={"known": Known(probability=0.999)}))
    path = tmp_path / "small.toml"
    recipe = load_recipe(path, [f"target.model={tiny_llama_dir}", *SETTINGS]).recipe
    subject = language_subject(recipe, torch.device("cpu"))
    elsewhere = start_decomposition(recipe, subject, ["layers.1.mlp.up_proj"])
    with pytest.raises(SpdError, match="does not decompose the first MLP"):
        open_table(subject, elsewhere, FACTS, SUBJECTS, 0.3, 0)
    first = start_decomposition(recipe, subject, [UP])
    with pytest.raises(UsageError, match="prompt 2 has no token ' Bryant'"):
        open_table(subject, first, FACTS, (" Bryant", " Bryant"), 0.3, 0)


# --- bounds ----------------------------------------------------------------------------------------


ATHLETES = {"athletes": PAIRS["athletes"]}


def edit_entry(own, others=0.01, median=0.01, mean=0.01):
    keys = {"median_relative_change": median, "mean_relative_change": mean, "max_relative_change": 0.3, "norm": 1.0}
    return {"own": own, "others": others, **keys}


def tables(kobe=-0.7, tiger=-0.9, **changes):
    rule = [edit_entry(kobe, **changes), edit_entry(tiger)]
    return {
        "athletes": [
            {"prompt": p, "token": "x", "edits": {"rule": one, "effect": edit_entry(-0.85)}}
            for p, one in zip(PAIRS["athletes"].prompts, rule, strict=True)
        ]
    }


@pytest.mark.parametrize(
    ("seed", "broken"),
    [
        (tables(), []),
        (tables(kobe=-0.6, tiger=-0.8), []),
        (tables(kobe=-0.59), ["basketball by rule: its own change"]),
        (tables(tiger=-0.79), ["golf by rule: its own change"]),
        (tables(others=0.1), ["basketball by rule: change of the other prompt"]),
        (tables(median=0.02), ["basketball by rule: median change of known facts"]),
        (tables(mean=0.051), ["basketball by rule: mean change of known facts"]),
    ],
)
def test_the_bounds_by_hand(seed, broken):
    verdict = judge([seed], fact_claims(ATHLETES))
    assert verdict.broken == [broken]
    assert verdict.passed == (verdict.failure() is None) == (not broken)
    assert len(verdict.rows) == 16
    assert [row.name for row in verdict.rows if not row.agrees] == broken


def test_a_choice_that_found_nothing_holds_no_bound():
    seed = tables()
    del seed["athletes"][0]["edits"]["rule"]
    assert len(judge([seed], fact_claims(ATHLETES)).broken[0]) == 4


def test_only_the_stated_pair_decides():
    assert [name for name, pair in PAIRS.items() if pair.stated] == ["athletes"]
    for claim in fact_claims({name: PAIRS[name] for name in ("painters", "landmarks")}):
        assert not claim.bound.stated


def test_methods_over_seeds():
    rows = method_rows([tables(), tables(kobe=-0.9)])
    row = plain(next(row for row in rows if row.method == "rule" and "Kobe" in row.prompt))
    assert row["own"] == {"mean": pytest.approx(-0.8), "min": -0.9, "max": -0.7}
    assert row["seeds"] == 2


# --- the command -----------------------------------------------------------------------------------


@pytest.fixture
def facts_here(tiny_llama_dir, tmp_path, monkeypatch, capsys):
    """`spd reproduce facts` on a tiny model that knows everything a little, with one pair of prompts."""
    prompts = ("Kobe Bryant plays professional basketball", "Tiger Woods plays the sport of golf")
    monkeypatch.setattr(fact_bounds, "PAIRS", {"one": Pair(prompts, SUBJECTS, (0.6, 0.8), True)})
    monkeypatch.setattr(facts_module, "load_facts", lambda path=None: FACTS)
    path = tmp_path / "small.toml"
    path.write_text(MODEL)
    run = spd_here(monkeypatch, capsys)
    sparse = "importance.gate_bias=-0.6"  # so that some slices are one prompt's own without much training
    settings = [part for one in (f"target.model={tiny_llama_dir}", *SETTINGS[1:], sparse) for part in ("--set", one)]
    return lambda *more: run("reproduce", "facts", "--recipe", path, "--out", tmp_path / "out", *settings, *more)


def test_reproduce_facts_from_recipe_to_verdict(facts_here, tmp_path):
    code, out, err = facts_here("--seeds", 2, "--json")
    assert out, err
    data = json.loads(out)
    assert data["schema"] == "spd.reproduce/1"
    assert code == (0 if data["passed"] else 1)
    assert [seed["seed"] for seed in data["seeds"]] == [0, 1]
    assert (tmp_path / "out" / "one" / "seed-1" / "decomposition.safetensors").exists()
    assert json.loads((tmp_path / "out" / "reproduce.json").read_text()) == data
    if not data["passed"]:
        assert "seeds meet every stated bound; broken: " in err
    written = (tmp_path / "out" / "one" / "seed-0" / "facts.json").stat().st_mtime_ns
    again, out, err = facts_here("--seeds", 2)
    assert again == code
    assert "is measured already" in err
    assert (tmp_path / "out" / "one" / "seed-0" / "facts.json").stat().st_mtime_ns == written
    for words in ("SPD, by rule", "static duals, whitened", "optimised (no location)", "Bounds"):
        assert words in out
    found = [list(entry["edits"]) for seed in data["seeds"] for entry in seed["tables"]["one"]]
    assert list(METHODS) in found
    assert all(methods in (list(METHODS), ["effect"], []) for methods in found)


def test_reproduce_facts_refusals(facts_here, monkeypatch, capsys):
    code, _, err = facts_here("--pair", "two")
    assert code == 2
    one_line(err, "--pair two: expected one of one")
    assert facts_here("--same-toy")[0] == 2
    run = spd_here(monkeypatch, capsys)
    code, _, err = run("reproduce", "facts", "--recipe", "induction-quick")
    assert code == 2
    one_line(err, "facts are those of a language model")
    assert run("reproduce", "induction", "--pair", "athletes")[0] == 2
