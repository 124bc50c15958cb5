"""Recorded results: of a listed command, by a commit, without a place of this machine, rendered by their schema."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import record
from generate import result_pages
from generate.markdown import code, duration, number, table
from generate.recorded import DOCS, RESULTS, Recording, Result, pages, recording, results, sentence
from printed import mistakes

RECORDED = [name for name in results() if recording(name) is not None]
MEASURED = Recording("x", "spd eval x", "c0ffee", "2026-01-02", "0.1.0", {}, 3.0, 0, (), {"a": {"b": [0.5]}})


@pytest.mark.parametrize("result", results().values(), ids=lambda result: result.name)
def test_a_listed_result_has_a_real_command_and_what_it_builds_on_comes_before(result: Result) -> None:
    names = list(results())
    spd = result.command.startswith("spd ")
    assert (
        (mistakes(result.command) == [])
        if spd
        else result.command.startswith(("python -m soak.soak ", "python -m walk.walk "))
    )
    assert result.page in {page.name for page in pages()}
    assert all(names.index(name) < names.index(result.name) for name in result.after)
    assert all((DOCS / name).exists() for name in result.files)


def test_no_recording_is_unlisted() -> None:
    assert {path.stem for path in RESULTS.glob("*.json")} <= set(results())


@pytest.mark.parametrize("name", RECORDED)
def test_a_recording_is_of_its_command_and_names_no_place_of_a_machine(name: str) -> None:
    recorded = recording(name)
    assert recorded is not None
    assert (recorded.name, recorded.command) == (name, results()[name].command), "record it again"
    assert re.fullmatch(r"[0-9a-f]{12}", recorded.commit)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", recorded.date)
    assert recorded.exit in (0, 1)
    assert {"processor", "cores", "threads", "torch"} <= set(recorded.machine)
    assert all((RESULTS / figure).exists() for figure in recorded.figures)
    text = (RESULTS / f"{name}.json").read_text(encoding="utf-8")
    assert not re.search(r'"(/\w|[A-Z]:\\)', text), "a path of this machine"


@pytest.mark.parametrize("name", RECORDED)
def test_a_recording_is_rendered_with_its_numbers(name: str) -> None:
    text = result_pages.section(results()[name])
    assert "| ---" in text or results()[name].command.split()[1] in ("train", "decompose")
    assert "{" not in sentence(results()[name], recording(name))  # type: ignore[arg-type]


def test_a_result_that_is_not_recorded_says_how_to_make_it() -> None:
    text = result_pages.section(Result("nowhere", "facts", "Nothing yet", "spd eval nowhere"))
    assert "`python docs/record.py nowhere`" in text
    assert "$ spd eval nowhere" in text


def test_a_sentence_takes_its_numbers_from_the_result() -> None:
    result = replace(next(iter(results().values())), shows="{a[b][0]:.0%} in {recorded[seconds]:.0f} s")
    assert sentence(result, MEASURED) == "50% in 3 s"


def test_a_command_is_recorded_with_where_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    (tmp_path / "facts.toml").write_text("")
    listing = Result("recipes", "facts", "Recipes", "spd recipe ls", files=("edits.toml",), figures=("facts.toml",))
    assert record.record(listing, tmp_path)
    assert (tmp_path / "docs/edits.toml").read_bytes() == (DOCS / "edits.toml").read_bytes()
    entry = json.loads((tmp_path / "results/recipes.json").read_text())
    assert entry["result"]["schema"] == "spd.recipe.ls/1"
    assert entry["result"]["recipes"][0]["path"].startswith("recipes/")
    assert entry["machine"]["processor"]
    assert (entry["exit"], entry["command"], entry["figures"]) == (0, "spd recipe ls", ["recipes-facts.toml"])
    assert (tmp_path / "results/recipes-facts.toml").exists()


def test_a_command_that_fails_leaves_no_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    assert not record.record(Result("none", "facts", "None", "spd recipe show nowhere"), tmp_path)
    assert not (tmp_path / "results").exists()


def test_markdown_by_hand() -> None:
    assert table(["a", "b"], [["x|y", 1]]) == "| a | b |\n| --- | ---: |\n| x&#124;y | 1 |"
    assert [number(value) for value in (0, 0.5, 1.23456, 3e-9, 12345.678, None)] == [
        "0", "0.5", "1.235", "3.0e-09", "12345.678", "–",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (3.21, 119, 125, 7300)] == [
        "3.2 seconds", "119.0 seconds", "2.1 minutes", "2.0 hours",
    ]  # fmt: skip
    assert [code("a"), code("`"), code("|")] == ["`a`", "<code>`</code>", "<code>&#124;</code>"]
