"""`spd suppress --script`: what is found and measured, against edits made by address; verdicts and exit codes."""

from __future__ import annotations

import json

import pytest
from small_runs import MODEL, TOY, one_line, save_toy, spd_here, toy_recipe

from spdcli.edits.choices import ANSWER_MEASURES, STATISTICS, Measure
from spdcli.edits.script import Expect, Script, ScriptEdit
from spdcli.runs.loading import load

FC, PROJ = "h.1.mlp.c_fc", "h.1.mlp.c_proj"
KOBE, TIGER = "Kobe Bryant plays professional basketball", "Tiger Woods plays the sport of golf"

FACTS = f"""\
[known]
probability = 1e-9
rank = 1000
[[fact]]
category = "own"
prompt = "{KOBE}"
[[fact]]
category = "other"
prompt = "the sport of golf"
[[fact]]
category = "other"
prompt = "Tiger Woods plays"
[[fact]]
category = "other"
prompt = "Kobe plays the golf"
"""

SCRIPT = f"""\
[[edit]]
name = "first"
slices = ["{FC}:0", "{FC}:3", "{PROJ}:1"]
together = "sequence"

[[edit.expect]]
name = "never"
prompt = 1
measure = "probability"
at_least = 2

[[edit.expect]]
prompt = "{TIGER}"
measure = "ratio"
at_most = 1000

[[edit.expect]]
prompt = "the sport of basketball"
measure = "kl"
at_least = 0

[[edit.expect]]
prompt = 2
token = "basketball"
measure = "rank"
at_least = 1

[[edit.expect]]
facts = "others"
measure = "median"
at_most = 1000

[[edit.expect]]
facts = "all"
measure = "max"
at_most = 1000

[[edit]]
name = "second"
slices = ["{FC}:0"]

[[edit.expect]]
prompt = 1
measure = "change"
at_most = 1000
"""


@pytest.fixture
def spd(monkeypatch, capsys):
    return spd_here(monkeypatch, capsys)


@pytest.fixture
def run(spd, tmp_path, tiny_gpt2_dir):
    recipe = tmp_path / "model.toml"
    recipe.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)))
    out = tmp_path / "run"
    assert spd("decompose", recipe, "--out", out, "--set", "slices.init='svd'")[0] == 0
    return out


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "edits.toml"

    def write(text):
        path.write_text(text)
        return path

    return write


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.toml"
    path.write_text(FACTS)
    return path


def answer(spd, *arguments):
    code, out, err = spd("suppress", *arguments, "--json")
    assert code in (0, 1), err
    return code, json.loads(out)


def by_address(spd, run, *options):
    return answer(spd, run, *options)[1]["effects"]


def test_values_are_those_of_edits_by_address(spd, run, script, facts):
    code, data = answer(spd, run, "--script", script(SCRIPT), "--facts", facts)
    assert code == 1, "a probability of 2 is expected"
    first = ["--slice", f"{FC}:0", "--slice", f"{FC}:3", "--slice", f"{PROJ}:1", "--together", "sequence", "--no-facts"]
    kobe, tiger = by_address(spd, run, *first)
    (other,) = by_address(spd, run, *first, "--prompt", "the sport of basketball")
    fact_texts = ["the sport of golf", "Tiger Woods plays", "Kobe plays the golf"]
    moved = by_address(spd, run, *first, *(part for text in fact_texts for part in ("--prompt", text)))
    changes = sorted(abs(effect["ratio"] - 1) for effect in moved)
    second = by_address(spd, run, "--slice", f"{FC}:0", "--no-facts")
    (asked,) = [e for e in data["edits"][0]["effects"] if (e["prompt"], e["token"]) == (TIGER, " basketball")]
    wanted = [
        kobe["after"],
        tiger["ratio"],
        other["kl"],
        asked["rank_after"],
        changes[1],
        max([*changes, abs(kobe["ratio"] - 1)]),
        abs(second[0]["ratio"] - 1),
    ]
    values = [one["value"] for one in data["expectations"]]
    assert values == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert [one["passed"] for one in data["expectations"]] == [False, True, True, True, True, True, True]
    assert [one["edit"] for one in data["expectations"]] == ["first"] * 6 + ["second"]
    first_line = data["expectations"][0]
    assert {key: first_line[key] for key in ("name", "bound", "at_least", "at_most")} == {
        "name": "never",
        "bound": "≥ 2",
        "at_least": 2,
        "at_most": None,
    }
    assert data["expectations"][3]["name"] == f"rank of ' basketball' of {TIGER!r}"
    assert data["schema"] == "spd.suppress/1"
    assert {effect["edit"] for effect in data["effects"]} == {"first", "second"}
    assert data["edits"][0]["facts"]["known"] == 3, "the run's own prompts are not other facts"


def bounds_of_all():
    expects = [f'prompt = 1\nmeasure = "{name}"' for name in ANSWER_MEASURES]
    expects += [f'facts = "others"\nmeasure = "{name}"' for name in STATISTICS]
    edit = f'[[edit]]\nname = "x"\nslices = ["{FC}:0"]\n'
    return edit + "".join(f"[[edit.expect]]\n{expect}\nat_most = 1e9\n" for expect in expects)


def rebuild():
    """pydantic reads the tables when a section is defined."""
    for section in (Expect, ScriptEdit, Script):
        section.model_rebuild(force=True)


def test_one_line_adds_a_measure(spd, run, script, facts, monkeypatch):
    """A script bounds every measure that the tables name, also those that are new."""
    with monkeypatch.context() as change:
        lost = Measure(about="what it lost", of=lambda answer: answer.before - answer.after)
        width = Measure(about="the largest less the least", of=lambda changes: changes.amax(-1) - changes.amin(-1))
        change.setitem(ANSWER_MEASURES, "lost", lost)
        change.setitem(STATISTICS, "range", width)
        rebuild()
        text = bounds_of_all()
        code, data = answer(spd, run, "--script", script(text), "--facts", facts)
    rebuild()
    assert code == 0
    assert spd("suppress", run, "--script", script(text), "--facts", facts)[0] == 2, "they are gone again"
    values = {one["name"].partition(" of ")[0]: one["value"] for one in data["expectations"]}
    assert list(values) == [*ANSWER_MEASURES, "lost", *STATISTICS, "range"]
    own = data["effects"][0]
    assert values["lost"] == own["before"] - own["after"]
    moved = [effect for effect in data["effects"] if effect["group"] == "fact" and effect["prompt"] != KOBE]
    changes = [abs(effect["ratio"] - 1) for effect in moved]
    assert values["range"] == pytest.approx(max(changes) - min(changes))
    assert data["facts"]["range_relative_change"] == values["range"]
    assert data["facts"]["interval"]["range"][0] <= values["range"]


def test_another_token_is_asked_at_the_answers_place(spd, run, script):
    text = SCRIPT.partition("[[edit.expect]]")[0] + (
        '[[edit.expect]]\nprompt = 1\ntoken = " golf"\nmeasure = "probability"\nat_most = 1\n'
    )
    value = answer(spd, run, "--script", script(text))[1]["expectations"][0]["value"]
    first = ["--slice", f"{FC}:0", "--slice", f"{FC}:3", "--slice", f"{PROJ}:1", "--together", "sequence", "--no-facts"]
    (effect,) = by_address(spd, run, *first, "--prompt", "Kobe Bryant plays professional golf")
    assert value == pytest.approx(effect["after"], rel=1e-4)


def test_a_selection_is_what_inspect_shows(spd, run, script):
    loaded = load(run)
    found = json.loads(spd("inspect", run, "--token", "Bryant", "--matrix", "h.1.mlp.*", "--top", "99", "--json")[1])
    listed = [entry["slice"] for entry in found["occurrences"][0]["slices"]]
    assert 0 < len(listed) <= sum(loaded.decomposition.of(name).U.shape[1] for name in (FC, PROJ))
    text = f"""\
[[edit]]
name = "chosen"
select = {{ prompt = "{KOBE}", token = " Bryant", unique = false, matrices = ["h.1.mlp.*"] }}
[[edit]]
name = "two"
select = {{ prompt = 1, token = "Bryant", unique = false, matrices = ["h.1.mlp.*"], top = 2, by = "effect" }}
"""
    data = answer(spd, run, "--script", script(text))[1]
    assert set(data["edits"][0]["slices"]) == set(listed)
    alone = {one: by_address(spd, run, "--slice", one, "--no-facts")[0]["after"] for one in listed}
    assert data["edits"][1]["slices"] == sorted(listed, key=lambda one: alone[one])[:2]


def test_a_dry_run_finds_and_does_nothing(spd, run, script, tmp_path):
    path = script(SCRIPT.partition('[[edit]]\nname = "second"')[0])
    before = sorted(tmp_path.rglob("*"))
    code, data = answer(spd, run, "--script", path, "--dry-run", "--save", tmp_path / "never")
    assert code == 0
    assert data["slices"] == [f"{FC}:0", f"{FC}:3", f"{PROJ}:1"]
    assert {one["passed"] for one in data["expectations"]} == {None}
    assert (data["effects"], data["facts"], data["saved"]) == ([], None, None)
    assert sorted(tmp_path.rglob("*")) == before
    code, out, _ = spd("suppress", run, "--script", path, "--dry-run", "-q")
    assert [line.split("\t")[0] for line in out.splitlines()] == ["planned"] * 6


def test_one_edit_is_written_unless_it_fails(spd, run, script, facts, tmp_path):
    one = SCRIPT.partition('[[edit]]\nname = "second"')[0]
    saved, patch = tmp_path / "saved", tmp_path / "p.safetensors"
    outputs = ("--facts", facts, "--save", saved, "--patch", patch)
    code, out, err = spd("suppress", run, "--script", script(one), *outputs)
    assert code == 1
    assert "1 of 6 expectations failed" in err
    assert "NO" in out
    assert not saved.exists()
    assert not patch.exists()
    code, data = answer(spd, run, "--script", script(one.replace("at_least = 2", "at_least = 0")), *outputs)
    assert code == 0
    assert saved.exists()
    assert patch.exists()
    assert data["saved"] == str(saved)
    applied = by_address(spd, run, "--apply", patch, "--no-facts")
    assert [effect["after"] for effect in applied] == pytest.approx([e["after"] for e in data["effects"][:2]], rel=1e-5)


def test_what_a_script_says(spd, run, script, facts):
    code, out, _ = spd("suppress", run, "--script", script(SCRIPT), "--facts", facts, "-q")
    assert code == 1
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines] == ["failed", *["passed"] * 6]
    assert lines[0][1:3] == ["first", "never"]
    plain = spd("suppress", run, "--script", script(SCRIPT), "--facts", facts)[1]
    assert "Expectations" in plain
    assert len(spd("suppress", run, "--script", script(SCRIPT), "--facts", facts, "-v")[1]) > len(plain)


def test_everything_that_is_not_there_is_told_at_once(spd, run, script):
    text = f"""\
[[edit]]
name = "a"
slices = ["{FC}:99"]
[[edit.expect]]
prompt = 7
measure = "kl"
at_most = 1
[[edit]]
name = "b"
select = {{ prompt = 1, token = "golfer" }}
[[edit.expect]]
prompt = 1
token = "golfer"
measure = "kl"
at_most = 1
[[edit]]
name = "c"
[edit.select]
prompt = 1
token = "Bryant"
matrices = ["h.8.*"]
"""
    path = script(text)
    code, out, err = spd("suppress", run, "--script", path)
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        f"error: {path}:3: [[edit]] '{FC}:99': {FC} has the slices 0 to 5",
        f"error: {path}:5: [[edit.expect]] prompt 7: expected one of the run's prompts, 1 to 2",
        f"error: {path}:10: [[edit]] no prompt has the token 'golfer'",
        f"error: {path}:13: [[edit.expect]] 'golfer' is no single token, but ' golf' + 'e' + 'r'",
        f"error: {path}:18: [[edit]] no decomposed matrix matches 'h.8.*'",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--slice", f"{FC}:0"], "--script and --slice contradict"),
        (["--together", "sequence"], "--script and --together contradict"),
        (["--prompt", KOBE], "--script and --prompt contradict"),
        (["--apply", "p"], "--script and --apply contradict"),
        (["--save", "x"], "--save writes one edit, and "),
        (["--no-facts"], "expects something of facts"),
    ],
)
def test_bad_input_is_one_line(options, said, spd, run, script):
    code, out, err = spd("suppress", run, "--script", script(SCRIPT), *options)
    assert (code, out) == (2, "")
    one_line(err, said)
    code, _, err = spd("suppress", run, "--slice", f"{FC}:0", "--dry-run")
    assert code == 2
    one_line(err, "--dry-run is for --script")


def test_a_toys_script(spd, script, tmp_path):
    trained = save_toy(tmp_path / "trained", toy_recipe(folder=tmp_path))
    recipe = tmp_path / "toy.toml"
    recipe.write_text(TOY.replace('"induction"', f'"induction"\npath = "{trained}"'))
    run = tmp_path / "run"
    assert spd("decompose", recipe, "--out", run)[0] == 0
    text = """\
[[edit]]
name = "s"
select = { prompt = 2, token = "s", unique = false, matrices = ["V1"], top = 2 }
[[edit.expect]]
prompt = 2
measure = "kl"
at_least = 0
[[edit.expect]]
prompt = 3
token = "s"
measure = "probability"
at_least = 0
"""
    code, data = answer(spd, run, "--script", script(text))
    assert code == 0
    assert len(data["slices"]) <= 2
    assert data["expectations"][0]["passed"]
    (asked,) = [effect for effect in data["effects"] if effect["token"] == "s"]
    assert asked["prompt"] == data["effects"][2]["prompt"]
    assert data["expectations"][1]["value"] == asked["after"]
    text += '[[edit.expect]]\nfacts = "others"\nmeasure = "max"\nat_most = 1\n'
    code, _, err = spd("suppress", run, "--script", script(text))
    assert code == 2
    one_line(err, "the induction toy knows no facts")
