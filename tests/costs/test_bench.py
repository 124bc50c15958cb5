"""`spd bench`: its cases, what a measurement looks like, and what is refused; nothing here is timed."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from small_runs import one_line, spd_here

from spdcli.commands.bench import row_data
from spdcli.costs.bench import Conditions, Measurement, Results, Row, measure, ratios_of, too_large
from spdcli.costs.cases import BENCHMARKS, RECONSTRUCTION, Options, batch_at, groups_of
from spdcli.costs.groups import Case, Group, Way
from spdcli.errors import SpdError
from spdcli.recipe.reading import load_recipe
from spdcli.records import plain

TINY = ("target.length=6", "target.d_model=4", "decompose.batch=2", "slices.C=3", "importance.kind=vector")


@pytest.mark.parametrize("what", BENCHMARKS)
@pytest.mark.parametrize("options", [Options(), Options(device="cuda"), Options(per_loss=True)])
def test_every_case_is_a_recipe_and_every_ratio_of_two_cases(what, options):
    groups = groups_of(what, options)
    cases = [case for group in groups for case in group.cases]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        load_recipe(case.recipe, case.settings)
        assert case.way in get_args(Way)
    for group in groups:
        names = {case.name for case in group.cases}
        compared = (*group.ratios.values(), *group.memory.values(), *group.growth.values())
        assert all(names.issuperset(several) for several in compared)


def test_the_command_knows_all_benchmarks(monkeypatch, capsys):
    spd = spd_here(monkeypatch, capsys)
    code, _, err = spd("bench", "stepp")
    assert code == 2
    one_line(err, f"is not one of {', '.join(repr(name) for name in BENCHMARKS)}")
    _, out, _ = spd("bench", "--help")
    assert all(f"{name}: " in " ".join(out.replace("│", " ").split()) for name in BENCHMARKS)


def test_table_2_is_the_papers():
    lines = [
        case.name for group in groups_of("importance", Options(lengths=[16], device="cuda")) for case in group.cases
    ]
    names = ("scalar", "vector", "attention dense", "attention blocked")
    assert lines == [f"{name}, length 16" for name in names]


def test_every_loss_by_itself():
    groups = groups_of("step", Options(per_loss=True, patterns=["toy-256"]))
    assert len(groups) == len(RECONSTRUCTION)
    for group in groups:
        for case in group.cases:
            losses = load_recipe(case.recipe, case.settings).recipe.losses
            wanted = {name for name, value in losses.model_dump().items() if "recon" in name and value}
            assert wanted == {case.name.rsplit(", ", 1)[1]}
        assert len(group.ratios) == 1


def test_batches_of_table_2():
    assert [batch_at(length, 64) for length in (16, 64, 1024, 10240)] == [64, 64, 64, 4]
    assert [batch_at(length, None) for length in (16, 64, 1024, 10240)] == [64, 64, 4, 1]


def test_patterns_choose_cases():
    (group,) = groups_of("step", Options(patterns=["toy-64 plan", "*one by one"]))[1:2]
    assert [case.name for case in group.cases] == ["toy-64 plan", "toy-64 one by one"]
    assert list(group.ratios) == ["toy-64 one by one / plan"]


def test_a_measurement(capsys):
    cases = [Case(way, "induction", TINY, way, labels={"batch": 2}) for way in ("plan", "plain")]
    steps = []
    group = Group(cases, {"plain / plan": ("plain", "plan")}, {"peaks": ("plain", "plan")})
    results = measure([group], Conditions(rounds=2, threads=1), steps.append)
    assert [row.case for row in results.rows] == cases
    assert results.ratios.keys() == {"plain / plan", "peaks"}
    rows = [plain(row_data(row)) for row in results.rows]
    assert [row["name"] for row in rows] == ["plan", "plain"]
    for row in rows:
        assert row["steps"] == 2
        assert 0 < row["fastest"] <= row["seconds"]
        assert 2**26 < row["base_bytes"] < row["peak_bytes"]
        assert row["flops"] > 0
        assert row["bytes"] > 0
        assert row["batch"] == 2
        assert row["product_share"] == pytest.approx(row["flops"] / row["seconds"] / row["product_flops_per_second"])
        assert row["operations"] > 0
        assert (row["way"], row["recipe"], row["settings"]) == (row["name"], "induction", list(TINY))
        assert row["keep_freed"]
    assert {step.total for step in steps} == {6}
    assert [step.text for step in steps if step.text != "matrix product"] == ["plan", "plain"] * 3
    assert "seconds" in json.dumps(rows)


@pytest.mark.parametrize(
    ("peaks", "wanted"), [((10, 20, 40), 2), ((1, 4, 16), 4), ((5, 6, 6), 0), ((5, 5, 9), None), ((5, 6), None)]
)
def test_growth_tells_a_line_from_a_square(peaks, wanted):
    names = ("small", "middle", "large")
    rows = {name: Measurement(1.0, peak, *9 * [1]) for name, peak in zip(names, peaks, strict=False)}
    assert ratios_of(Group([], growth={"growth": names}), rows) == ({} if wanted is None else {"growth": wanted})


def test_long_cases_make_fewer_steps():
    group = Group([Case("plan", "induction", TINY)], seconds=0)
    (row,) = measure([group], Conditions(rounds=3, threads=1)).rows
    assert row.measurement.steps == 1


def test_what_does_not_fit_is_not_started(monkeypatch):
    monkeypatch.setattr("spdcli.costs.estimate.free_bytes", lambda device: 0)
    cases = [Case("small", "induction", TINY), Case("large", "induction", TINY, large=True, labels={"batch": 2})]
    pair = {"large / small": ("large", "small")}
    steps = []
    results = measure([Group(cases, pair, pair), Group(cases[1:])], Conditions(rounds=1, threads=1), steps.append)
    small, *large = [row_data(row) for row in results.rows]
    assert "skipped" not in small
    assert small["seconds"] > 0
    assert results.ratios == {}
    assert {step.text for step in steps} == {"matrix product", "small"}
    assert (steps[0].done, steps[0].total) == (2, 6)
    for row in large:
        assert (row["name"], row["batch"]) == ("large", 2)
        assert row["skipped"].startswith("needs ")
        assert "seconds" not in row
    monkeypatch.setattr("spdcli.costs.estimate.free_bytes", lambda device: 2**40)
    assert too_large(cases[1], "cpu") == ""


def test_a_skipped_case_is_told(monkeypatch, capsys):
    case = Case("large, length 8", "induction", labels={"batch": 2})
    results = Results([Row(case, skipped="needs 40.1 GiB, 20.0 are free")], {})
    monkeypatch.setattr("spdcli.costs.bench.measure", lambda *arguments: results)
    spd = spd_here(monkeypatch, capsys)
    code, out, err = spd("bench", "importance")
    assert code == 0
    assert "skipped" in out
    assert "large, length 8: not measured: needs 40.1 GiB" in err
    code, out, _ = spd("bench", "importance", "--json")
    row = {"name": "large, length 8", "batch": 2, "skipped": "needs 40.1 GiB, 20.0 are free"}
    row |= {"way": "plan", "recipe": "induction", "settings": [], "keep_freed": True}
    assert (code, json.loads(out)["rows"]) == (0, [row])
    assert spd("bench", "importance", "-q") == (0, "", "")


def test_dense_attention_is_looked_at_first():
    large = {case.name for group in groups_of("importance", Options()) for case in group.cases if case.large}
    assert large == {"attention dense, length 1024", "attention dense, length 10240"}


def test_what_goes_wrong_in_a_process_is_told_with_its_case():
    group = Group([Case("broken", "induction", ("target.lenght=3",))])
    with pytest.raises(SpdError, match="broken: RecipeError"):
        measure([group], Conditions(rounds=1))


def test_a_benchmark_of_nothing_is_refused(monkeypatch, capsys):
    spd = spd_here(monkeypatch, capsys)
    for arguments in (("step", "--case", "nothing"), ("importance", "--lengths", "16,two")):
        code, out, err = spd("bench", *arguments)
        assert (code, out) == (2, "")
        one_line(err)
