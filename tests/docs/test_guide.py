"""The guide's own blocks: its Python runs as printed, and its files are files that spd reads."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from conftest import save_tiny_model
from printed import ROOT, blocks, spd_commands
from small_runs import spd_here
from small_world import make_small_world

from spdcli.edits.counterfact import load_records
from spdcli.edits.facts_file import load_facts
from spdcli.progress import Report

GUIDE = ROOT / "docs/guide"


def shown(page: str, language: str) -> list[str]:
    """The blocks of a page in a language."""
    return [block.text for block in blocks((GUIDE / page).read_text(encoding="utf-8")) if block.language == language]


def test_its_python_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "model", "llama", num_hidden_layers=6, tie_word_embeddings=False)
    make_small_world(tmp_path, model, monkeypatch)
    names: dict[str, object] = {}
    for block in shown("python.md", "python"):
        exec(block.replace('"decompose.steps": 200', '"decompose.steps": 20'), names)
    whole, masked, without = (names[name] for name in ("whole", "masked", "without"))
    assert isinstance(whole, torch.Tensor)
    assert not torch.equal(whole, masked)  # type: ignore[arg-type]
    assert not torch.equal(whole, without)  # type: ignore[arg-type]
    for block in shown("look.md", "python"):
        exec(block, names)
    assert "".join(names["view"].pieces) == "Kobe Bryant plays professional"  # type: ignore[attr-defined]


def test_the_page_on_text_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = save_tiny_model(tmp_path / "model", "llama", num_hidden_layers=6)
    make_small_world(tmp_path, model, monkeypatch)
    sentences = [f"The train to New York leaves at {n}.\n" for n in range(200)]
    (tmp_path / "texts.txt").write_text("".join(sentences))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in sentences))
    spd = spd_here(monkeypatch, capsys)
    printed = {}
    for command in spd_commands((GUIDE / "text.md").read_text(encoding="utf-8")):
        code, out, err = spd(*shlex.split(command)[1:])
        assert code == 0, (command, err)
        printed[command.split()[1]] = out
    assert "held-out text" in printed["eval"]
    assert "layers.4." in printed["search"]
    assert json.loads(printed["harvest"])["slices"][0]["slice"].startswith("layers.4.mlp.up_proj")
    for block in shown("text.md", "python"):
        exec(block, {})


def test_the_page_on_processes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "model", "llama", num_hidden_layers=6)
    make_small_world(tmp_path, model, monkeypatch)
    asked: list[int] = []

    def here(count: int, work: str, request: dict, report: Report) -> None:
        asked.append(count)
        resolve_name(work)(json.loads(json.dumps(request)), report)

    monkeypatch.setattr("spdcli.api.launch", here)
    names: dict = {}
    for block in shown("processes.md", "python"):
        exec(block, names)
    assert asked == [2]
    assert names["run"].home.last_record["step"] == 6
    (script,) = shown("processes.md", "bash")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert len(script.splitlines()) <= 12


def test_the_facts_file_is_one(tmp_path: Path) -> None:
    (text,) = [text for text in shown("edits.md", "toml") if "[[fact]]" in text]
    (tmp_path / "facts.toml").write_text(text)
    facts = load_facts(tmp_path / "facts.toml")
    assert [fact.prompt for fact in facts.fact][:2] == ["The capital of Norway is Oslo", "The capital of Peru is Lima"]
    assert facts.fact[2].answer == "New York City"
    assert facts.related[0].kind == "reversed"


def test_the_records_are_those_of_counterfact(tmp_path: Path) -> None:
    (text,) = shown("edits.md", "json")
    (tmp_path / "records.json").write_text(text)
    (record,) = load_records(tmp_path / "records.json")
    assert record.requested_rewrite.text == "Kobe Bryant plays professional"
    assert record.neighborhood_prompts == ["Michael Jordan plays professional"]
