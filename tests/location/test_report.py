"""`spd report`: its rows against the other commands and against models changed by hand, its files, its words."""

from __future__ import annotations

import json

import pytest
from edited_models import answer_change
from planted_gates import FC, plant_gates
from small_runs import MODEL, TOY, one_line, save_toy, spd_here, toy_recipe

from spdcli.edits.answer_changes import AnswerChange
from spdcli.edits.choices import STATISTICS
from spdcli.edits.collateral import ChangeSizes
from spdcli.edits.facts_file import load_facts
from spdcli.files import save_tensors
from spdcli.location.report import FactCounts, ReportSettings, RunReport, report_facts
from spdcli.location.report_edits import SLICES
from spdcli.location.report_markdown import markdown, percent, size, table
from spdcli.location.report_rows import ReportRow, summed_up, traced_rows
from spdcli.location.tracing import BestSite, Trace, TraceSettings
from spdcli.location.zeroed_layers import most_needed
from spdcli.records import plain
from spdcli.runs.directory import DECOMPOSITION
from spdcli.runs.loading import load

KOBE, TIGER = "Kobe Bryant plays professional basketball", "Tiger Woods plays the sport of golf"
FACTS = f"""\
[known]
probability = 1e-9
rank = 100000

[[fact]]
category = "sport"
prompt = "{KOBE}"
subject = "Kobe Bryant"

[[fact]]
category = "sport"
prompt = "{TIGER}"
subject = "sport of"

[[fact]]
category = "sport"
prompt = "Bryant plays the sport of golf"

[[fact]]
category = "sport"
prompt = "Woods plays basketball"

[[related]]
of = "{KOBE}"
kind = "paraphrase"
prompt = "the professional Bryant plays basketball"

[[related]]
of = "{KOBE}"
kind = "reversed"
prompt = "professional basketball plays Bryant"
"""
FEW = ["--samples", 2, "--window", 1, "--random", 2]


@pytest.fixture
def spd(monkeypatch, capsys):
    return spd_here(monkeypatch, capsys)


@pytest.fixture
def run(spd, tmp_path, tiny_gpt2_dir):
    """A run of which it is known which slices are active where."""
    recipe = tmp_path / "run.toml"
    recipe.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)))
    changes = ["importance.gate_width=1", "importance.activation=relu", f'slices.matrices=["{FC}", "h.1.mlp.c_proj"]']
    changes += ["data.stream='generated'", "data.stream_sequences=8", "data.stream_length=8"]
    settings = [part for change in changes for part in ("--set", change)]
    code, _, err = spd("decompose", recipe, "--out", tmp_path / "run", *settings)
    assert code == 0, err
    _, decomposition, _ = plant_gates(tiny_gpt2_dir, tmp_path)
    save_tensors(tmp_path / "run" / DECOMPOSITION, decomposition.state_dict())
    return tmp_path / "run"


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.toml"
    path.write_text(FACTS)
    return path


def answer(spd, *arguments):
    code, out, err = spd(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def row_of(entry, name):
    (found,) = [row for row in entry["rows"] if row["name"] == name]
    return found


def test_the_rows_are_what_the_other_commands_say(spd, run, facts):
    data = answer(spd, "report", run, "--facts", facts, *FEW)
    assert (data["schema"], data["matrix"], data["facts"]) == ("spd.report/1", FC, {"asked": 2, "known": 2})
    kobe, tiger = data["prompts"]
    assert (kobe["prompt"], kobe["answer"], kobe["subject"], kobe["named_at"]) == (
        KOBE,
        " basketball",
        [0, 1, 2],
        [2],
    )
    assert kobe["chosen"]["rule"] == [f"{FC}:0"]
    assert tiger["chosen"]["rule"] == [f"{FC}:2"]
    assert [(one["slices"], one["tokens"]) for one in tiger["slices"]] == [([f"{FC}:2"], [" of"])]
    for how in ("rule", "effect"):
        chosen = [part for one in kobe["chosen"][how] for part in ("--slice", one)]
        suppressed = answer(spd, "suppress", run, *chosen, "--facts", facts)
        row = row_of(kobe, f"slices, by {how}")
        own, other = (effect["ratio"] - 1 for effect in suppressed["effects"] if effect["group"] == "prompt")
        assert (row["own"], row["others"]) == (pytest.approx(own, abs=1e-6), pytest.approx(other, abs=1e-6))
        for name in ("median", "mean", "max"):
            key = f"{name}_relative_change"
            assert row["facts"][key] == pytest.approx(suppressed["facts"][key], abs=1e-6)
            assert row["facts"]["interval"][name] == pytest.approx(suppressed["facts"]["interval"][name], abs=1e-6)
    zeroed = answer(spd, "ablate", run, "--mlp", "all")["alone"]
    assert data["mlp_zeroed"].keys() == zeroed.keys() == {"mlp 0", "mlp 1", "mlp 2"}
    needed = most_needed(0, [[AnswerChange(**effect) for effect in effects] for effects in zeroed.values()])
    for layer in (0, needed):
        ratios = [effect["ratio"] - 1 for effect in zeroed[f"mlp {layer}"]]
        row = row_of(kobe, f"MLP {layer} zeroed")
        assert (row["own"], row["others"]) == (pytest.approx(ratios[0], abs=1e-6), pytest.approx(ratios[1], abs=1e-6))
        one = answer(spd, "ablate", run, "--mlp", layer, "--facts", facts)["facts"]
        assert row["facts"]["mean_relative_change"] == pytest.approx(one["mean_relative_change"], abs=1e-6)
    traced = answer(spd, "trace", run, "--samples", 2, "--window", 1)["prompts"][0]
    assert kobe["trace"]["best"] == traced["best"]
    for row, best in zip(kobe["rows"], [traced["best"][0]], strict=False):
        assert row["own"] == pytest.approx(best["reverse"] / traced["clean"] - 1)
        assert (row["others"], row["facts"]) == (None, None)


def test_the_report_needs_no_console(spd, run, facts):
    loaded, steps = load(run), []
    report = report_facts(
        loaded.subject,
        loaded.decomposition,
        loaded.recipe.data,
        loaded.recipe.slices.ridge,
        load_facts(facts),
        settings=ReportSettings(TraceSettings(samples=2, window=1), random=2),
        report=steps.append,
    )
    data = answer(spd, "report", run, "--facts", facts, *FEW)
    assert plain(report) == {key: data[key] for key in ("matrix", "facts", "mlp_zeroed", "prompts", "evidence")}
    assert [(step.done, step.total) for step in steps] == [(number, 8) for number in range(1, 8)]
    text = markdown("run", report, ReportSettings(), 3, [])
    assert "| importance masks, delta 1 everywhere | corner |" in text
    assert "importance masks (weakest)" in text


def test_what_leaks_is_measured_on_other_words(spd, run, facts):
    kobe, tiger = answer(spd, "report", run, "--facts", facts, *FEW)["prompts"]
    assert tiger["related"] == []
    assert [(one["kind"], one["prompt"]) for one in kobe["related"]] == [
        ("paraphrase", "the professional Bryant plays basketball"),
        ("reversed", "professional basketball plays Bryant"),
    ]
    words = [part for one in kobe["related"] for part in ("--prompt", one["prompt"])]
    chosen = [part for one in kobe["chosen"]["rule"] for part in ("--slice", one)]
    effects = answer(spd, "suppress", run, *chosen, *words, "--no-facts")["effects"]
    for one, effect in zip(kobe["related"], effects, strict=True):
        assert set(one["edits"]) == {"rule", "effect", "direct"}
        assert one["before"] == pytest.approx(effect["before"], rel=1e-5)
        assert one["edits"]["rule"]["after"] == pytest.approx(effect["after"], rel=1e-5)
        assert one["token"] == effect["token"]


def test_the_report_is_a_directory(spd, run, facts):
    code, out, err = spd("report", run, "--facts", facts, *FEW, "--markdown")
    assert (code, err) == (0, "")
    folder = run / "report"
    assert out.splitlines()[-1] == str(folder / "report.html")
    for said in (f"{KOBE}: where is it?", "tracing: hidden state at", "random directions, largest of 2", "What leaks"):
        assert said in out
    text = (folder / "report.md").read_text()
    data = json.loads((folder / "report.json").read_text())
    for entry in data["prompts"]:
        assert f"## {entry['prompt']}" in text
        for row in entry["rows"]:
            assert f"| {row['name']} | " in text
        evidence, sought = text.partition(f"## {entry['prompt']}")[2].partition("Sought for the effect")[::2]
        assert "optimised in" not in evidence
        assert f"| optimised in {FC} | " in sought
    assert "**Not evidence.**" in text
    assert "The facts file says this fact in no other words." in text
    names = {"mlp-zeroed", "slices", "trace-1", "trace-2", "names-1", "names-2"}
    of_the_page = {"decomposition", "patterns"}
    assert {path.name for path in folder.glob("*.png")} == {f"{name}.png" for name in names | of_the_page}
    assert {path.name for path in folder.glob("*.svg")} == {f"{name}.svg" for name in names | of_the_page}
    assert {path.rpartition("/")[2].partition(".")[0] for path in data["figures"]} == names | of_the_page
    assert all(f"![{name}]({name}.png)" in text for name in names)
    code, out, err = spd("report", run, "--facts", facts, *FEW, "-q", "--out", run / "again")
    assert (code, out, err) == (0, f"{run / 'again' / 'report.html'}\n", "")
    assert not (run / "again" / "report.md").exists()
    again = json.loads((run / "again" / "report.json").read_text())
    assert again["prompts"] == data["prompts"]  # the seed says all


def test_figures_of_slices_are_drawn_alone(spd, run, facts, tmp_path):
    code, out, err = spd(
        "report", run, "--facts", facts, "--figure", 3, "--figure", 4, "--out", tmp_path / "alone", "-q"
    )
    assert (code, err) == (0, "")
    names = [f"{name}.{kind}" for name in ("slices", "names-1", "names-2") for kind in ("png", "svg")]
    assert out.splitlines() == [str(tmp_path / "alone" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == sorted(names)


def rule_of(spd, run, name):
    """How much of the weights a slice's suppression takes, |ûᵀ W v̂|."""
    (cut,) = answer(spd, "suppress", run, "--slice", name, "--no-facts")["matrices"]
    return abs(cut["projections"][0])


def test_a_model_that_knows_no_fact(spd, run):
    data = answer(spd, "report", run, *FEW, "--matrix", "h.1.mlp.c_proj", "--subject", "Bryant")
    assert data["matrix"] == "h.1.mlp.c_proj"
    assert data["facts"]["known"] == 0
    assert data["facts"]["asked"] > 100
    assert data["prompts"][0]["subject"] == [2]
    assert all(row["facts"] is None for entry in data["prompts"] for row in entry["rows"])
    both = {name: rule_of(spd, run, name) for name in ("h.1.mlp.c_proj:1", "h.1.mlp.c_proj:4")}
    assert data["prompts"][0]["chosen"]["rule"] == [max(both, key=both.get)]  # 1 is active at another token, too
    tiger = data["prompts"][1]
    assert tiger["chosen"]["rule"] == tiger["slices"] == []  # 'Tiger Woods', where no slice of this prompt is active
    assert tiger["named_at"] == [1, 2]
    assert "slices, by rule" not in [row["name"] for row in tiger["rows"]]


def test_what_cannot_be_reported(spd, run, facts, tmp_path):
    trained = save_toy(tmp_path / "trained", toy_recipe(folder=tmp_path))
    recipe = tmp_path / "toy.toml"
    recipe.write_text(TOY.replace('"induction"', f'"induction"\npath = "{trained}"'))
    assert spd("decompose", recipe, "--out", tmp_path / "toy")[0] == 0
    for arguments, said in (
        ([tmp_path / "toy", "--facts", facts], "the induction toy knows none"),
        ([tmp_path / "toy", "--markdown"], "--markdown is about facts"),
        ([run, "--no-facts", "--facts", facts], "--facts and --no-facts contradict each other"),
        ([run, "--subject", "Koby"], "no prompt has the subject 'Koby'"),
        ([run, "--matrix", "h.2.mlp.c_fc"], "the run decomposes no matrix 'h.2.mlp.c_fc'"),
    ):
        code, out, err = spd("report", *arguments)
        assert (code, out) == (2, "")
        one_line(err, said)


def test_the_needed_layer_destroys_nothing_else():
    ratios = [(0.0, 0.0), (0.1, 0.3), (0.6, 0.9), (0.5, 0.6), (0.9, 0.1)]  # of two prompts, by layer
    effects = [[answer_change(ratio) for ratio in row] for row in ratios]
    assert most_needed(0, effects) == 3  # 1 lowers it further, and the other prompt to less than half
    assert most_needed(1, effects) == 4
    assert most_needed(0, effects[:2]) == 1  # there is no better one
    assert most_needed(0, effects[:1]) == 0
    assert most_needed(0, [row[:1] for row in effects]) == 1  # no other prompt to spare


# --- parts by hand ---------------------------------------------------------------------------------------


def test_rows_of_several_edits_are_sizes():
    facts = lambda x: ChangeSizes(relative_change=dict.fromkeys(STATISTICS, x))  # noqa: E731
    rows = [ReportRow("a", SLICES, -0.5, None, facts(0.1)), ReportRow("b", SLICES, 0.1, -0.2, facts(0.3))]
    largest = plain(summed_up("both", rows, max))
    assert (largest["own"], largest["others"], largest["facts"]["max_relative_change"]) == (0.5, 0.2, 0.3)
    assert (largest["name"], largest["kind"], largest["sizes"]) == ("both", SLICES, True)
    assert "restores" not in largest
    assert summed_up("", [ReportRow("a", SLICES, 0.1, None, None)], max).facts is None


def test_traced_rows_by_hand():
    best = [
        BestSite(kind, where, position, 0, (0, reach), effect, standard_error=0.0, reverse=0.1)
        for kind, reach in (("state", 0), ("mlp", 4), ("attention", 4))
        for where, position, effect in (("subject", 0, 0.2), ("after", 1, 0.4))
    ]
    rows = traced_rows(Trace("K is it", " it", ("K", " is"), (0,), 1.0, 0.4, 0.1, 0.0, {}, best))
    assert [row.name for row in rows] == [
        "tracing: hidden state at 'K', layer 0",
        "tracing: MLPs at ' is', layers 0 to 4",
        "tracing: attention at ' is', layers 0 to 4",
    ]
    assert [row.own for row in rows] == pytest.approx([-0.75] * 3)
    assert [row.restores for row in rows] == [0.2, 0.4, 0.4]


def test_markdown_by_hand():
    assert [percent(-0.915), percent(None), size(-0.004)] == ["-91.5%", "–", "0.4%"]
    assert table(("a", "b"), [("x|y", "1")]) == ["| a | b |", "|---|---:|", "| x&#124;y | 1 |", ""]
    bare = RunReport("m", FactCounts(asked=4, known=3), {}, [])
    text = markdown("r", bare, ReportSettings(TraceSettings(samples=4)), 30, [])
    assert "4 draws, windows of 10 of 30 layers" in text
    assert "the 3 of 4 other facts that the unchanged model knows" in text
