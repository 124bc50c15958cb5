"""Facts: the shipped file and its notes, mistakes with their lines, what counts as known, collateral by hand."""

from __future__ import annotations

import json
import random
import statistics

import pytest
import torch
from edited_models import answer_change
from small_runs import MODEL, model_recipe, one_line, spd_here

from spdcli.edits import ablation
from spdcli.edits.answer_changes import present_answers
from spdcli.edits.collateral import bootstrap, collateral, mark_known, relative_change
from spdcli.edits.fact_check import check_facts
from spdcli.edits.facts_file import BUILTIN, Known, dump_facts, first_comments, load_facts
from spdcli.edits.known_facts import OtherFacts, fact_questions
from spdcli.edits.prompts_and_answers import GROUP_PADDING, given_questions, question_groups
from spdcli.edits.suppression import find_slices
from spdcli.engine.target import Batch
from spdcli.errors import RecipeError
from spdcli.records import plain
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import language_subject
from spdcli.targets.huggingface import build_target, load_model

FEW = """\
# Facts of a test.
models = ["other"]

[[fact]]
category = "sport"
prompt = "Kobe Bryant plays professional basketball"
pair = "athletes"
known_by = ["other"]

[[fact]]
category = "sport"
prompt = "Tiger Woods plays the sport of golf"
pair = "athletes"

[[fact]]
category = "city"
prompt = "the sport of golf"

[[related]]
of = "Tiger Woods plays the sport of golf"
kind = "paraphrase"
prompt = "Tiger Woods plays professional golf"

[[related]]
of = "Tiger Woods plays the sport of golf"
kind = "reversed"
prompt = "golf the sport of Tiger Woods"
"""


@pytest.fixture
def spd(monkeypatch, capsys):
    return spd_here(monkeypatch, capsys)


@pytest.fixture
def few(tmp_path):
    path = tmp_path / "few.toml"
    path.write_text(FEW)
    return path


# --- files -----------------------------------------------------------------------------------------------


def test_the_shipped_facts_cover_what_they_promise():
    facts = load_facts()
    assert len(facts.fact) >= 100
    assert {"sport", "capital", "city", "author", "science", "firm", "painting", "language", "history", "animal"} <= {
        fact.category for fact in facts.fact
    }
    assert {fact.pair for fact in facts.fact if fact.pair} == {"athletes", "painters", "landmarks"}
    for fact in facts.fact:
        assert fact.prompt == " ".join(fact.prompt.split()), "no stray spaces: they are tokens"
        assert len(fact.prompt.split()) >= 4
        if fact.pair:
            kinds = {related.kind for related in facts.related_to(fact.prompt)}
            assert kinds == {"paraphrase", "reversed"}, fact.prompt
            assert fact.subject, "spd trace asks for none"
    assert len({len(fact.prompt.split()) for fact in facts.fact}) >= 6, "a mix of lengths"
    noted = [fact for fact in facts.fact if "SmolLM2-135M-Instruct" in fact.known_by]
    assert 50 <= len(noted) < len(facts.fact)


def test_a_dump_is_read_back(tmp_path):
    facts = load_facts()
    odd = facts.fact[0].model_copy(
        update={"prompt": 'a "quoted" \\ back\tslash\x7f é\n', "pair": None, "subject": None}
    )
    partner = facts.fact[1].model_copy(update={"pair": None})
    related = [entry for entry in facts.related if entry.of not in (facts.fact[0].prompt, facts.fact[1].prompt)]
    changed = facts.model_copy(update={"fact": [odd, partner, *facts.fact[2:]], "related": related})
    path = tmp_path / "back.toml"
    path.write_text(dump_facts(changed, ["one", "two"]))
    assert load_facts(path) == changed
    assert first_comments(path.read_text()) == ["one", "two"]
    assert dump_facts(facts, first_comments(BUILTIN.read_text())) == BUILTIN.read_text(), "written by the command"


def test_every_mistake_has_its_line(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(
        """\
[known]
probability = 1
[[fact]]
categry = "x"
prompt = "a b"
[[fact]]
category = 3
prompt = ""
known_by = ["m", 1]
[[related]]
of = "a b"
kind = "reverse"
prompt = "b a"
"""
    )
    with pytest.raises(RecipeError) as error:
        load_facts(path)
    assert [str(problem) for problem in error.value.problems] == [
        f"{path}:2: [known] probability = 1: expected a number between 0 and 1",
        f"{path}:3: [[fact]] missing key 'category' (text in quotes, not empty)",
        f"{path}:4: [[fact]] unknown key 'categry' (did you mean 'category'?)",
        f"{path}:7: [[fact]] category = 3: expected text in quotes, not empty",
        f"{path}:8: [[fact]] prompt = '': expected text in quotes, not empty",
        f"{path}:9: [[fact]] known_by[1] = 1: expected text in quotes, not empty",
        f"{path}:12: [[related]] kind = 'reverse': expected one of 'paraphrase', 'reversed' (did you mean 'reversed'?)",
    ]
    assert str(BUILTIN) in error.value.hint


def test_what_types_cannot_say_has_its_line_too(few):
    text = FEW.replace(
        'prompt = "the sport of golf"',
        'prompt = "Tiger Woods plays the sport of golf"\npair = "lone"\nsubject = "chess"',
    )
    few.write_text(
        text.replace('kind = "reversed"', 'kind = "reversed" # twice').replace(
            'of = "Tiger Woods plays the sport of golf"\nkind = "paraphrase"',
            'of = "Tiger Woods plays golf"\nkind = "paraphrase"',
        )
    )
    with pytest.raises(RecipeError) as error:
        load_facts(few)
    assert [str(problem).removeprefix(f"{few}:") for problem in error.value.problems] == [
        "17: [[fact]] prompt = 'Tiger Woods plays the sport of golf': is there already, as [[fact]] number 2",
        "18: [[fact]] pair = 'lone': expected two facts of a pair, not 1",
        "19: [[fact]] subject = 'chess': expected words of its prompt, 'Tiger Woods plays the sport of golf'",
        "22: [[related]] of = 'Tiger Woods plays golf': expected a fact's prompt "
        "(did you mean 'Tiger Woods plays the sport of golf'?)",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x = [", ":1:6: not valid TOML"),
        ("", "missing section [[fact]]"),
        ("fact = []", "fact = []: expected sections, at least one"),
    ],
)
def test_a_file_that_is_none_is_one_line(content, said, spd, few):
    few.write_text(content)
    code, out, err = spd("facts", "ls", "--facts", few)
    assert (code, out) == (2, "")
    one_line(err, said)
    code, _, err = spd("facts", "ls", "--facts", few.with_name("nowhere.toml"))
    assert code == 2
    one_line(err, "nowhere.toml: cannot be read: No such file", "a facts file is a TOML file")


# --- questions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 9, 10, 14, 1000])
def test_groups_hold_every_question_once_within_their_bound(tokens):
    lengths = torch.tensor([5, 2, 7, 2, 3, 5])
    valid = torch.arange(7) < lengths[:, None]
    ids = torch.arange(42).view(6, 7)
    seen = []
    for rows, batch in question_groups(Batch(ids, valid, valid, torch.arange(6)), tokens):
        longest = int(lengths[rows].max())
        assert batch.tokens.shape == (len(rows), longest)
        assert torch.equal(batch.tokens, ids[rows, :longest])
        assert torch.equal(batch.answers, rows)
        assert len(rows) == 1 or len(rows) * longest <= tokens
        assert longest - int(lengths[rows].min()) <= GROUP_PADDING
        seen += rows.tolist()
    assert seen == sorted(range(6), key=lambda row: (lengths[row], row))


def open_tiny(folder, few):
    language_model = load_model(str(folder), "float64")
    facts = load_facts(few)
    target = build_target(language_model, False)
    questions = fact_questions(language_model.tokenizer, [*facts.fact, *facts.related], False, target.device)
    return target, questions


def test_answers_in_groups_are_those_of_one_prompt_at_a_time(tiny_gpt2_dir, few, monkeypatch):
    target, questions = open_tiny(tiny_gpt2_dir, few)
    monkeypatch.setattr("spdcli.edits.prompts_and_answers.question_groups", lambda batch: question_groups(batch, 12))
    now = present_answers(target, questions)
    for row, (tokens, valid) in enumerate(zip(questions.batch.tokens, questions.batch.valid, strict=True)):
        p = target.model(tokens[valid][None]).logits[0, -1].softmax(-1)
        own = p[questions.batch.answers[row]]
        assert now.p[row].item() == pytest.approx(own.item(), rel=1e-9)
        assert now.rank[row] == sum(other > own for other in p.tolist()) + 1
    assert questions.group == "fact"


def test_known_is_both_thresholds():
    p, rank = torch.tensor([0.5, 0.5, 0.2, 0.1], dtype=torch.float64), torch.tensor([1, 2, 1, 1])
    assert Known().holds(p, rank).tolist() == [True, False, False, False]
    assert Known(probability=0.1, rank=2).holds(p, rank).tolist() == [True, True, True, False]
    effects = [answer_change(before=a, rank_before=b) for a, b in zip(p.tolist(), rank.tolist(), strict=True)]
    assert [effect.known for effect in mark_known(effects, Known(rank=2))] == [True, True, False, False]


def test_facts_known_to_a_model_are_above_both_thresholds(tiny_gpt2_dir, few):
    target, questions = open_tiny(tiny_gpt2_dir, few)
    now = present_answers(target, questions)
    rows = list(zip(questions.texts, now.p.tolist(), now.rank.tolist(), strict=True))
    p, rank = (sorted(column)[len(rows) // 2] for column in (now.p.tolist(), now.rank.tolist()))
    for known in (Known(probability=p, rank=10**6), Known(probability=1e-9, rank=rank), Known(probability=p, rank=1)):
        expected = [text for text, own_p, own_rank in rows if own_p > known.probability and own_rank <= known.rank]
        facts = OtherFacts(questions, known).known_to(target)
        assert (facts.questions.texts if facts is not None else []) == expected
        assert len(expected) < len(rows)


# --- collateral ------------------------------------------------------------------------------------------


def effect(ratio, known=True, group="fact"):
    return answer_change(ratio, known=known, group=group)


def test_collateral_by_hand():
    effects = [effect(1.1), effect(0.5), effect(1.0), effect(3.0), effect(9.0, known=False)]
    facts = collateral([*effects, effect(7.0, group="prompt")])
    assert (facts.known, facts.asked) == (4, 5)
    written = plain(facts)
    assert written["median_relative_change"] == pytest.approx(0.3)  # of 0, 0.1, 0.5, 2
    assert written["mean_relative_change"] == pytest.approx(0.65)
    assert written["max_relative_change"] == pytest.approx(2.0)
    assert [worst["prompt"] for worst in written["worst"]] == ["3.0", "0.5", "1.1"]
    assert torch.equal(relative_change(torch.tensor([0.0, 1.0, 2.0])), torch.tensor([1.0, 0.0, 1.0]))


def test_nothing_known_is_no_number():
    written = plain(collateral([effect(2.0, known=False)]))
    assert (written["known"], written["asked"], written["worst"]) == (0, 1, [])
    assert {written[f"{name}_relative_change"] for name in ("median", "mean", "max")} == {None}
    assert written["interval"] == {"median": None, "mean": None, "max": None}


def test_intervals_are_those_of_a_slow_bootstrap():
    """Two independent bootstraps of 4000 draws agree to a few standard errors of their quantiles."""
    changes = torch.rand(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64) ** 4
    draw = random.Random(5)
    values = {"median": [], "mean": [], "max": []}
    for _ in range(4000):
        sample = draw.choices(changes.tolist(), k=40)
        values["median"].append(statistics.median(sample))
        values["mean"].append(statistics.fmean(sample))
        values["max"].append(max(sample))
    found = bootstrap(changes, seed=0, draws=4000)
    for name, slow in values.items():
        slow.sort()
        tolerance = 0.1 * statistics.stdev(slow) + 0.01
        assert found[name][0].item() == pytest.approx(slow[100], abs=tolerance), name
        assert found[name][1].item() == pytest.approx(slow[3899], abs=tolerance), name
    again = bootstrap(changes, seed=0, draws=4000)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not torch.equal(bootstrap(changes, seed=1, draws=4000)["mean"], found["mean"])


# --- the command -----------------------------------------------------------------------------------------


def checked(spd, *arguments):
    code, out, err = spd("facts", "check", *arguments, "--json")
    assert err == "" or err.startswith("warning: the file has no notes on ")
    return code, json.loads(out)


def test_check_says_what_a_model_knows_and_whether_the_notes_are_right(spd, few, tiny_gpt2_dir, tmp_path):
    code, data = checked(spd, tiny_gpt2_dir, "--facts", few)
    assert code == 0, "the file says nothing about this model"
    assert data["schema"] == "spd.facts.check/1"
    assert data["model"] == tiny_gpt2_dir.name
    assert [entry["agrees"] for entry in data["facts"]] == [None] * 5
    below, above = sorted(entry["p"] for entry in data["facts"])[2:4]
    thresholds = ("--probability", f"{(below + above) / 2:.12f}", "--rank", "1000")
    _, data = checked(spd, tiny_gpt2_dir, "--facts", few, *thresholds, "--name", "other")
    knows = [entry["known"] for entry in data["facts"]]
    assert data["known"] == sum(knows) == 2
    assert data["disagree"] == sum(entry["known"] != (row == 0) for row, entry in enumerate(data["facts"]))
    new = tmp_path / "new.toml"
    code, out, _ = spd(
        "facts", "check", tiny_gpt2_dir, "--facts", few, *thresholds, "--name", "other", "--write", new, "-q"
    )
    assert (code, out) == (0, f"{new}\n")
    written = load_facts(new)
    assert [bool(entry.known_by) for entry in [*written.fact, *written.related]] == knows
    assert new.read_text().startswith("# Facts of a test.\nmodels = ")
    code, data = checked(spd, tiny_gpt2_dir, "--facts", new, "--name", "other")
    assert (code, data["disagree"]) == (0, 0)
    flip = new.read_text().replace('known_by = ["other"]', "known_by = []", 1)
    new.write_text(flip)
    code, data = checked(spd, tiny_gpt2_dir, "--facts", new, "--name", "other")
    assert (code, data["disagree"]) == (1, 1)
    (wrong,) = [entry for entry in data["facts"] if entry["agrees"] is False]
    assert wrong["known"]
    assert not wrong["noted"]
    code, out, _ = spd("facts", "check", tiny_gpt2_dir, "--facts", new, "--name", "other")
    assert code == 1
    assert out.count("WRONG") == 1


def test_notes_on_other_models_are_told_not_to_be_compared(spd, few, tiny_gpt2_dir):
    code, _, err = spd("facts", "check", tiny_gpt2_dir, "--facts", few, "--name", "nobody")
    assert code == 0
    noted = load_facts(few).models
    hint = f"; its notes are on {', '.join(noted)}: --name says that it is one of them" if noted else ""
    assert f"warning: the file has no notes on 'nobody', so none was compared{hint}" in err
    _, data = checked(spd, tiny_gpt2_dir, "--facts", few, "--name", "nobody")
    assert data["compared"] == 0


def test_check_takes_a_run(spd, few, tiny_gpt2_dir, tmp_path):
    recipe = tmp_path / "model.toml"
    recipe.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)))
    assert spd("decompose", recipe, "--out", tmp_path / "run")[0] == 0
    _, of_run = checked(spd, tmp_path / "run", "--facts", few)
    _, of_model = checked(spd, tiny_gpt2_dir, "--facts", few)
    assert of_run["facts"] == of_model["facts"]
    assert of_run["model"] == tiny_gpt2_dir.name


def test_a_begin_token_is_put_where_it_is_asked_for(spd, few, tiny_gpt2_dir):
    _, without = checked(spd, tiny_gpt2_dir, "--facts", few)
    _, with_begin = checked(spd, tiny_gpt2_dir, "--facts", few, "--begin-token")
    pairs = zip(without["facts"], with_begin["facts"], strict=True)
    assert all(abs(one["p"] / other["p"] - 1) > 1e-3 for one, other in pairs)


def test_check_refuses_what_it_cannot_do(spd, few, tiny_gpt2_dir, tmp_path):
    code, _, err = spd("facts", "check", tiny_gpt2_dir, "--facts", few, "--write", few)
    assert code == 2
    one_line(err, "is there already", "--force")
    code, _, err = spd("facts", "check", tiny_gpt2_dir, "--facts", few, "--write", few, "--force", "--rank", "3")
    assert code == 2
    one_line(err, "notes on other are for other thresholds")
    code, _, err = spd("facts", "check", "./nowhere")
    assert code == 2
    one_line(err, "there is no model at 'nowhere'")


def test_ls_lists(spd, few):
    code, out, _ = spd("facts", "ls", "--facts", few)
    assert code == 0
    assert "Kobe Bryant plays professional basketball" in out
    data = json.loads(spd("facts", "ls", "--json")[1])
    assert len(data["facts"]) == len(load_facts().fact)
    assert data["known"] == {"probability": 0.2, "rank": 1}
    assert spd("facts", "ls", "--facts", few, "-q")[1].splitlines()[2] == "the sport of golf"


@pytest.mark.slow
def test_the_shipped_notes_are_right(smollm2):
    """Every note on SmolLM2, and every answer of a fact is a whole word."""
    facts = load_facts()
    checks = check_facts(
        build_target(smollm2, False), smollm2.tokenizer, facts, False, "SmolLM2-135M-Instruct", facts.known
    )
    assert [one.prompt for one in checks if not one.agrees] == []
    for one in checks[: len(facts.fact)]:
        assert one.token == f" {one.prompt.split(' ')[-1]}"
    pairs = {fact.prompt for fact in facts.fact if fact.pair}
    assert all(one.p > 0.3 for one in checks if one.prompt in pairs)


# --- facts of an edit ------------------------------------------------------------------------------------


@pytest.fixture
def run(spd, tmp_path, tiny_gpt2_dir):
    recipe = tmp_path / "model.toml"
    recipe.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)))
    out = tmp_path / "run"
    assert spd("decompose", recipe, "--out", out, "--set", "slices.init='svd'")[0] == 0
    return out


def every_fact_known(few):
    few.write_text(FEW.replace('models = ["other"]', 'models = ["other"]\n[known]\nprobability = 1e-9\nrank = 1000'))
    return few


@pytest.mark.parametrize(
    "change",
    [
        ["suppress", "--slice", "h.1.mlp.c_fc:0"],
        ["ablate", "--slice", "h.1.mlp.c_fc:0", "--others", "importance"],
        ["ablate", "--mlp", "1"],
    ],
)
def test_an_edits_facts_are_the_same_prompts_asked_by_hand(spd, run, few, change):
    command, *options = change
    data = json.loads(spd(command, run, *options, "--facts", every_fact_known(few), "--json")[1])
    facts = [entry for entry in data["effects"] if entry["group"] == "fact"]
    assert [entry["prompt"] for entry in facts] == ["the sport of golf"], "the other two are the run's own prompts"
    texts = [part for entry in facts for part in ("--prompt", entry["prompt"])]
    by_hand = json.loads(spd(command, run, *options, *texts, "--no-facts", "--json")[1])
    assert by_hand["facts"] is None
    for one, other in zip(facts, by_hand["effects"], strict=True):
        for key in ("before", "after", "ratio", "kl"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7)
    assert data["facts"]["known"] == data["facts"]["asked"] == 1
    assert data["facts"]["max_relative_change"] == pytest.approx(abs(facts[0]["ratio"] - 1))


def test_a_prompt_that_is_asked_is_no_fact(spd, run, few):
    asked = ("--prompt", "the sport of golf")
    data = json.loads(spd("suppress", run, "--slice", "h.1.mlp.c_fc:0", "--facts", few, *asked, "--json")[1])
    assert data["facts"] is None
    assert {entry["group"] for entry in data["effects"]} == {"prompt"}


def test_masks_of_many_facts_are_drawn_in_groups(tiny_gpt2_dir, tmp_path, monkeypatch):
    """However the questions are grouped, an ablation is the one of each question alone."""
    recipe = model_recipe(tiny_gpt2_dir, "target.dtype='float64'", "slices.init='svd'", folder=tmp_path)
    subject = language_subject(recipe, torch.device("cpu"))
    decomposition = start_decomposition(recipe, subject, ["h.0.mlp.c_fc", "h.2.mlp.c_proj"]).requires_grad_(False)
    texts = ["the sport of golf", "Tiger Woods plays golf", "Kobe Bryant plays professional basketball", "the golf of"]
    cut = (find_slices(decomposition, ["h.0.mlp.c_fc:1"]), [])
    masking = ablation.Masking("importance")
    whole = ablation.ablate_many(subject, decomposition, given_questions(subject, texts), cut, masking)
    monkeypatch.setattr(ablation, "PLAN_BYTES", 1000)
    grouped = ablation.ablate_many(subject, decomposition, given_questions(subject, texts), cut, masking)
    for text, one, other in zip(texts, whole, grouped, strict=True):
        question = given_questions(subject, [text])
        alone = ablation.measure_cuts(subject, decomposition, question, {"": cut}, masking)[""][0]
        for effect in (one, other):
            assert effect.prompt == text
            assert effect.after == pytest.approx(alone.after, rel=1e-9)


def test_facts_that_are_too_long_are_left_out_aloud(spd, run, few):
    few.write_text(f'{FEW}\n[[fact]]\ncategory = "long"\nprompt = "{"x" * 65}"\n')
    code, out, err = spd("suppress", run, "--slice", "h.1.mlp.c_fc:0", "--facts", few)
    assert code == 0
    assert err == "warning: 1 facts are longer than this model takes, and are left out\n"
    assert "Of 1 facts this model knows none" in out


def test_facts_on_the_terminal(spd, run, few):
    command = ("suppress", run, "--slice", "h.1.mlp.c_fc:0", "--facts", every_fact_known(few))
    out = spd(*command)[1]
    assert "The 1 known of 1 other facts" in out
    assert "median" in out
    assert "most moved: the sport of golf" in out
    assert out.count("the sport of golf ") < spd(*command, "-v")[1].count("the sport of golf ")
    assert len(spd(*command, "-q")[1].splitlines()) == 2, "a line for each of the run's prompts"


def test_facts_of_the_wrong_kind_are_one_line(spd, run, few, tmp_path):
    code, _, err = spd("suppress", run, "--slice", "h.1.mlp.c_fc:0", "--facts", few, "--no-facts")
    assert code == 2
    one_line(err, "--facts and --no-facts contradict")
    few.write_text(FEW.replace("category", "categories", 1))
    for command in ("suppress", "ablate"):
        code, out, err = spd(command, run, "--slice", "h.1.mlp.c_fc:0", "--facts", few)
        assert (code, out) == (2, "")
        assert f"{few}:5: [[fact]] unknown key 'categories' (did you mean 'category'?)" in err
