"""`spd locate`: ranking, collateral, pairs and limits, against models whose weights are changed by hand."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from edited_models import in_place
from planted_gates import FC, PLANTED, PROJ, plant_gates
from small_runs import MODEL, TOY, one_line, save_toy, spd_here, toy_recipe

from spdcli.edits.facts_file import Fact, Facts, Known
from spdcli.edits.known_facts import known_facts
from spdcli.edits.prompts_and_answers import about_token, given_questions, join, pick
from spdcli.edits.selection import own_activity
from spdcli.edits.suppression import Address
from spdcli.errors import UsageError
from spdcli.location.edit_measurer import AnswerEffect, EditMeasurer
from spdcli.location.locate import Search, candidates, locate, search_prompt
from spdcli.records import plain

FACTS = ["the sport of golf", "Tiger Woods plays", "Kobe plays the golf", "plays of the sport"]
FLOAT = {"rel": 2e-4, "abs": 1e-7}  # the planted model is in float32


@pytest.fixture(scope="module")
def planted(tiny_gpt2_dir, tmp_path_factory):
    subject, decomposition, _ = plant_gates(tiny_gpt2_dir, tmp_path_factory.mktemp("planted"))
    activity, own = own_activity(subject, decomposition, 0)
    facts = given_questions(subject, FACTS)
    return subject, decomposition, activity, own, facts


def search_all(planted, facts=True, **settings):
    subject, decomposition, activity, own, known = planted
    wanted = Search(**settings)
    found = candidates(decomposition, activity, 0, wanted)
    asked = (pick(own, [0]), pick(own, [1]), known if facts else None)
    return plain(search_prompt(subject, decomposition, found, *asked, wanted))


def by_hand(planted, addresses):
    """Ratios of all answers (prompt, other prompt, facts) when the weights themselves are changed."""
    subject, decomposition, _, own, facts = planted
    questions = join([own, facts])
    rows, answers = torch.arange(len(questions.texts)), questions.batch.answers

    def cut():
        for name in {one.matrix for one in addresses}:
            own_slices, W = decomposition.of(name), subject.target.matrices[name].weight
            index = [one.index for one in addresses if one.matrix == name]
            U, V = own_slices.U[:, index].double(), own_slices.V[index].double()
            before = W.double().clone()
            for u, v in zip(U.t() / U.norm(dim=0)[:, None], V / V.norm(dim=1, keepdim=True), strict=True):
                W.sub_(((u @ before @ v) * torch.outer(u, v)).to(W))

    before = in_place(subject, questions, lambda: None)[rows, answers]
    return (in_place(subject, questions, cut)[rows, answers] - before).exp().tolist()


def active_in_prompt(row):
    return {
        f"{name}:{index}"
        for (name, index), where in PLANTED.items()
        if where == "everywhere" or any(b == row for b, _ in where)
    }


def test_candidates_are_the_slices_active_in_the_prompt(planted):
    _, decomposition, activity, _, _ = planted
    for row in (0, 1):
        assert {str(one) for one in candidates(decomposition, activity, row, Search())} == active_in_prompt(row)
    only = candidates(decomposition, activity, 0, Search(matrices=("h.1.*",)))
    assert {str(one) for one in only} == {f"{PROJ}:1", f"{PROJ}:4"}
    strong = candidates(decomposition, activity, 0, Search(threshold=0.6))
    assert {str(one) for one in strong} == {f"{FC}:0", f"{PROJ}:1", f"{PROJ}:4"}


@pytest.mark.parametrize("statistic", ["mean", "median", "max"])
def test_slices_are_ranked_by_what_changed_weights_say(planted, statistic):
    found = search_all(planted, statistic=statistic, paired=0)
    assert {entry["slice"] for entry in found["slices"]} == active_in_prompt(0)
    assert (found["prompt"], found["token"]) == ("Kobe Bryant plays professional basketball", " basketball")
    assert found["candidates"] == len(found["slices"]) == 5
    assert found["known_facts"] == 4
    of = {"mean": statistics.fmean, "median": statistics.median, "max": max}
    for entry in found["slices"]:
        name, index = entry["slice"].rsplit(":", 1)
        own, other, *facts = by_hand(planted, [Address(name, int(index))])
        assert entry["ratio"] == pytest.approx(own, **FLOAT)
        assert entry["after"] == pytest.approx(entry["before"] * own, **FLOAT)
        assert entry["fall"] == pytest.approx(math.log(own), rel=1e-3, abs=1e-6)
        changes = [abs(ratio - 1) for ratio in facts]
        assert entry["others"] == pytest.approx([abs(other - 1)], rel=1e-3, abs=1e-5)
        for name in of:
            assert entry["facts"][name] == pytest.approx(of[name](changes), rel=1e-3, abs=1e-5)
        wanted = max(abs(other - 1), of[statistic](changes))
        assert entry["collateral"] == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    after = [entry["after"] for entry in found["slices"]]
    assert after == sorted(after)


def test_pairs_are_those_that_do_more_than_their_sum(planted):
    found = search_all(planted, pairs=99)
    single = {entry["slice"]: entry for entry in found["slices"]}
    wanted = {}
    for one, other in itertools.combinations(single, 2):
        addresses = [Address(name, int(index)) for name, index in (text.rsplit(":", 1) for text in (one, other))]
        fall = math.log(by_hand(planted, addresses)[0])
        excess = fall - single[one]["fall"] - single[other]["fall"]
        if excess < 0:
            wanted[frozenset((one, other))] = (fall, excess)
    assert found["pairs_measured"] == 10
    assert found["pairs_above_sum"] == len(found["pairs"]) == len(wanted) > 0
    for entry in found["pairs"]:
        fall, excess = wanted[frozenset(entry["slices"])]
        assert entry["fall"] == pytest.approx(fall, rel=1e-3, abs=1e-5)
        assert entry["excess"] == pytest.approx(excess, rel=1e-2, abs=2e-5)
        assert entry["collateral"] is not None
    excesses = [entry["excess"] for entry in found["pairs"]]
    assert excesses == sorted(excesses)
    assert len(search_all(planted, pairs=1)["pairs"]) == 1
    assert search_all(planted, paired=3)["pairs_measured"] == 3


@pytest.mark.parametrize("facts", [True, False])
@pytest.mark.parametrize(("group", "kept"), [(256, 4096), (4, 4096), (4, 0)])
@pytest.mark.parametrize("statistic", ["mean", "median", "max"])
def test_a_limit_passes_over_what_moves_the_others(planted, facts, group, kept, statistic, monkeypatch):
    """Whether facts are asked at once or by and by, and whether their clean passes are kept."""
    monkeypatch.setattr("spdcli.location.edit_measurer.FACT_TOKENS", group)
    monkeypatch.setattr("spdcli.location.edit_measurer.KEPT_TOKENS", kept)
    search = partial(search_all, statistic=statistic)
    free = search(planted, facts, paired=0)["slices"]
    limit = statistics.median(entry["collateral"] for entry in free) + 1e-9
    found = search(planted, facts, limit=limit, top=1)
    lowering = [entry for entry in free if entry["fall"] < 0 and entry["collateral"] <= limit]
    assert [entry["slice"] for entry in found["slices"]] == [entry["slice"] for entry in lowering[:1]]
    every = search(planted, facts, limit=limit)
    assert [entry["slice"] for entry in every["slices"]] == [entry["slice"] for entry in lowering]
    allowed = {entry["slice"] for entry in free if max(entry["others"]) <= limit}
    assert all(set(pair["slices"]) <= allowed and pair["collateral"] <= limit for pair in every["pairs"])
    assert search(planted, facts, limit=0.0)["slices"] == []


@pytest.mark.parametrize(("statistic", "left"), [("median", ["calm", "late"]), ("mean", ["calm"]), ("max", ["calm"])])
def test_an_edit_is_given_up_only_when_it_is_sure(planted, statistic, left, monkeypatch):
    """One fact a group. `late` moves the first of four far and no other: its median is 0 in the end."""
    subject, _, _, own, facts = planted
    moves = {"calm": [0.0, 0.1, 0.0, 0.0], "late": [3.0, 0.0, 0.0, 0.0], "wild": [3.0, 3.0, 3.0, 0.0]}
    asked = []

    def told(target, clean, edits):
        asked.append(list(edits))
        number = len(asked) - 1
        ratios = {name: torch.tensor([1 + moves[name][number]], dtype=torch.float64) for name in edits}
        return {name: SimpleNamespace(ratio=ratio) for name, ratio in ratios.items()}

    monkeypatch.setattr("spdcli.location.edit_measurer.FACT_TOKENS", 1)
    monkeypatch.setattr("spdcli.location.edit_measurer.measure_group", told)
    measurer = EditMeasurer(subject.target, pick(own, [0]), None, facts, statistic, limit=0.2)
    measurer.edits = {name: {} for name in moves}
    effect = AnswerEffect(before=0.5, after=0.1, ratio=0.2, kl=0.0, rank_after=1, fall=-1.0, others=[])
    assert list(measurer.side_effects(dict.fromkeys(moves, effect), 3)) == left
    assert "wild" not in asked[3], "it is given up before the last fact"


def test_only_facts_that_the_model_knows_count(planted):
    subject, _, _, _, facts = planted
    log_p = in_place(subject, facts, lambda: None)
    own = log_p[torch.arange(4), facts.batch.answers].exp()
    middle = own.sort().values[1].item() * (1 + 1e-6)
    known = known_facts(subject, facts_file(middle), []).questions
    assert set(known.texts) == {text for text, p in zip(FACTS, own.tolist(), strict=True) if p > middle}
    assert len(known.texts) == 2
    beside = known_facts(subject, facts_file(middle), known.texts[:1]).questions
    assert beside.texts == known.texts[1:]
    assert known_facts(subject, facts_file(0.999999), []) is None


def facts_file(probability):
    return Facts(
        known=Known(probability=probability, rank=10**6), fact=[Fact(category="c", prompt=text) for text in FACTS]
    )


def test_one_call_searches_each_prompt_or_one(planted):
    subject, decomposition, *_ = planted
    every = locate(subject, decomposition, facts=facts_file(1e-9))
    assert plain(every[0]) == search_all(planted)
    assert [one.prompt for one in every] == own_prompts(planted)
    for prompt in (2, own_prompts(planted)[1]):
        assert locate(subject, decomposition, [prompt], facts=facts_file(1e-9)) == every[1:]
    (foreign,) = locate(subject, decomposition, ["Tiger Woods plays golf"], "basketball")
    assert (foreign.prompt, foreign.token, foreign.known_facts) == ("Tiger Woods plays golf", " basketball", 0)
    assert {len(entry.others) for entry in foreign.slices} == {2}
    itself = locate(subject, decomposition, [FACTS[0]], facts=facts_file(1e-9))
    assert itself[0].known_facts == 3, "a prompt is no other fact"


def own_prompts(planted):
    return planted[3].texts


def test_gates_that_see_a_span_are_warned_of(planted):
    subject, decomposition, *_ = planted
    told = []

    def warned():
        return [one for one in told if one.warning]

    locate(subject, decomposition, ["Tiger Woods plays golf"], report=told.append)
    assert warned() == []
    bases = decomposition.importances.bases
    try:
        decomposition.importances.bases = torch.nn.ParameterDict(
            {name.replace(".", "/"): torch.nn.Parameter(torch.eye(width)) for name, width in ((FC, 32), (PROJ, 128))}
        )
        locate(subject, decomposition, [1], report=told.append)
        assert warned() == []
        locate(subject, decomposition, ["Tiger Woods plays golf"], report=told.append)
    finally:
        decomposition.importances.bases = bases
    (progress,) = warned()
    assert "the span of its own prompts" in progress.text


def test_without_others_there_is_no_collateral(planted):
    subject, decomposition, activity, own, _ = planted
    found = candidates(decomposition, activity, 0, Search())
    alone = search_prompt(subject, decomposition, found, pick(own, [0]), None, None, Search())
    assert {(entry.collateral, entry.facts) for entry in alone.slices} == {(None, None)}
    golf = about_token(subject, pick(own, [0]), "golf")
    assert search_prompt(subject, decomposition, found, golf, None, None, Search()).token == " golf"
    with pytest.raises(UsageError, match="no slice of these matrices is active in 'Kobe"):
        search_prompt(subject, decomposition, [], pick(own, [0]), None, None, Search())


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def spd(monkeypatch, capsys):
    return spd_here(monkeypatch, capsys)


@pytest.fixture
def run(spd, tmp_path, tiny_gpt2_dir):
    recipe = tmp_path / "model.toml"
    recipe.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)))
    assert spd("decompose", recipe, "--out", tmp_path / "run", "--set", "slices.init='svd'")[0] == 0
    return tmp_path / "run"


@pytest.fixture
def facts(tmp_path):
    sections = "".join(f'[[fact]]\ncategory = "c"\nprompt = "{text}"\n' for text in FACTS)
    path = tmp_path / "facts.toml"
    path.write_text(f"[known]\nprobability = 1e-9\nrank = 1000\n{sections}")
    return path


def located(spd, run, *options):
    code, out, err = spd("locate", run, *options, "--json")
    assert code == 0, err
    return json.loads(out)


def test_the_command_keeps_its_contract(spd, run, facts):
    data = located(spd, run, "--facts", facts, "--paired", "3")
    assert data["schema"] == "spd.locate/1"
    assert [one["token"] for one in data["located"]] == [" basketball", " golf"]
    assert (data["prompt"], data["token"]) == ("Kobe Bryant plays professional basketball", " basketball")
    assert {"slice", "before", "after", "collateral"} <= data["slices"][0].keys()
    assert data["slices"] == data["located"][0]["slices"]
    for one in data["located"]:
        for entry in one["pairs"]:
            assert {"slices", "after", "collateral"} <= entry.keys()
    best = data["slices"][0]
    options = ("--slice", best["slice"], "--facts", facts, "--json")
    made = json.loads(spd("suppress", run, *options)[1])
    assert made["effects"][0]["after"] == pytest.approx(best["after"], rel=1e-5)
    assert made["facts"]["mean_relative_change"] == pytest.approx(best["facts"]["mean"], rel=1e-3, abs=1e-7)


def test_prompts_by_number_text_or_of_ones_own(spd, run):
    number = located(spd, run, "--prompt", "2", "--no-facts", "--paired", "0")
    text = located(spd, run, "--prompt", "Tiger Woods plays the sport of golf", "--no-facts", "--paired", "0")
    assert number["slices"] == text["slices"]
    assert len(number["located"]) == 1
    own = located(spd, run, "--prompt", "Tiger Woods plays golf", "--token", "basketball", "--no-facts")
    assert (own["prompt"], own["token"]) == ("Tiger Woods plays golf", " basketball")
    assert len(own["slices"][0]["others"]) == 2, "both of the run's prompts"
    several = located(spd, run, "--prompt", "2", "--prompt", "Tiger Woods plays golf", "--no-facts", "--paired", "0")
    assert [one["prompt"] for one in several["located"]] == [text["prompt"], own["prompt"]]
    only = located(spd, run, "--prompt", "1", "--matrix", "*c_fc", "--no-facts")
    assert located(spd, run, "--prompt", "1", "--matrices", "*c_fc", "--no-facts") == only, "as it was called"
    assert {entry["slice"].split(":")[0] for entry in only["slices"]} == {"h.1.mlp.c_fc"}


def test_what_it_says(spd, run, facts):
    code, out, _ = spd("locate", run, "--prompt", "1", "--facts", facts, "--top", "3")
    assert code == 0
    assert "' basketball' of 'Kobe Bryant plays professional basketball'" in out
    assert "pairs" in out
    best = [entry["slice"] for entry in located(spd, run, "--prompt", "1", "--facts", facts, "--top", "3")["slices"]]
    assert spd("locate", run, "--prompt", "1", "--facts", facts, "--top", "3", "-q")[1].split() == best
    _, out, _ = spd("locate", run, "--prompt", "1", "--no-facts", "--others-limit", "0")
    assert "collateral at most 0" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", "3"], "prompt 3: expected one of the run's prompts, 1 to 2"),
        (["--token", "golfer"], "'golfer' is no single token"),
        (["--matrix", "h.9.*"], "no decomposed matrix matches 'h.9.*'"),
        (["--threshold", "1"], "no slice of these matrices is active"),
        (["--facts", "nowhere.toml"], "nowhere.toml: cannot be read"),
    ],
)
def test_bad_input_is_one_line(options, said, spd, run):
    code, out, err = spd("locate", run, *options)
    assert (code, out) == (2, "")
    one_line(err, said)


def test_a_toy_is_searched_too(spd, tmp_path):
    trained = save_toy(tmp_path / "trained", toy_recipe(folder=tmp_path))
    recipe = tmp_path / "toy.toml"
    recipe.write_text(TOY.replace('"induction"', f'"induction"\npath = "{trained}"'))
    assert spd("decompose", recipe, "--out", tmp_path / "run")[0] == 0
    data = located(spd, tmp_path / "run", "--top", "2")
    assert len(data["located"]) == 4
    assert all(len(entry["others"]) == 3 for one in data["located"] for entry in one["slices"])
