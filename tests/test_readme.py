"""README.md as it is printed: its commands run in order in one folder, its Python too, and its files are whole.

The language model is a tiny random one and the recipes are made small; what the same commands say of the real ones is
recorded in docs/results.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tiny_model
from generate import parts, result_pages
from generate.recorded import results
from printed import ROOT, blocks, spd_commands
from small_world import make_small_world

import spdcli
from spdcli import cli
from spdcli.console import Console
from spdcli.edits.script import load_script
from spdcli.records import plain

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAIN = spd_commands(README)
MAY_SAY_NO = ("suppress athletes --script",)  # exit code 1: a random model does not meet what is expected of SmolLM2
LONGEST = 200


def demo_commands() -> list[str]:
    """What `make demo` runs."""
    target = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert target
    return [line.strip().removeprefix("$(BIN)/") for line in target[1].splitlines()]


def shown(language: str) -> str:
    """The one block of README.md in a language."""
    (block,) = [block for block in blocks(README) if block.language == language]
    return block.text


def written_runs(commands: list[str]) -> list[str]:
    """The directories and files that commands write."""
    words = [shlex.split(command, comments=True) for command in commands]
    return [line[nth + 1] for line in words for nth, word in enumerate(line) if word in ("--out", "--save", "--patch")]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= LONGEST


def test_no_two_sections_write_the_same() -> None:
    in_python = re.findall(r'out="([^"]+)"', shown("python"))
    written = [*written_runs([*demo_commands(), *CHAIN]), *in_python]
    assert len(written) == len(set(written))
    assert {"athletes", "edited", "restored", "demo/induction", "run"} == set(written) - {"edit.safetensors"}


def test_what_make_demo_and_the_chain_print_is_recorded_on_the_real_models() -> None:
    listed = {result.command for result in results().values()}
    reverting = [command for command in CHAIN if "--revert" in command]
    plain = [" ".join(shlex.split(command, comments=True)) for command in [*demo_commands(), *CHAIN]]
    assert {" ".join(shlex.split(one)) for one in listed} | set(reverting) >= set(plain)


def test_the_edit_script_is_whole(tmp_path: Path) -> None:
    (tmp_path / "edits.toml").write_text(shown("toml"))
    script, _ = load_script(tmp_path / "edits.toml")
    assert [edit.name for edit in script.edit] == ["Kobe forgets basketball", "Tiger forgets golf"]


def test_every_room_says_what_it_is() -> None:
    assert "|  |\n" not in parts.rooms().split("\n", 2)[2] + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything of README.md happens, in order."""
    place = tmp_path_factory.mktemp("reader")
    (place / "docs").mkdir()
    (place / "docs/edits.toml").write_text(shown("toml"))
    return place


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six blocks, which the recipe's matrices need."""
    return save_tiny_model(
        tmp_path_factory.mktemp("six-blocks"), "llama", num_hidden_layers=6, tie_word_embeddings=False
    )


def rendered_answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on, every answer of a command as the pages of results show its JSON."""
    pages: list[str] = []
    show = Console.show

    def kept(console: Console, data: Mapping[str, Any], *renderables: Any) -> None:
        pages.append(result_pages.body(json.loads(json.dumps(plain(data)))))
        show(console, data, *renderables)

    monkeypatch.setattr(Console, "show", kept)
    return pages


def test_its_commands_run_in_order(
    folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_small_world(folder, tiny_model, monkeypatch)
    pages = rendered_answers(monkeypatch)
    for command in [*demo_commands(), *CHAIN]:
        monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        err = capsys.readouterr().err
        wanted = (0, 1) if command.startswith(tuple(f"spd {one}" for one in MAY_SAY_NO)) else (0,)
        assert exit_.value.code in wanted, f"{command}\n{err}"
    assert len(pages) == len([*demo_commands(), *CHAIN])
    assert all("| ---" in page or "Total loss" in page for page in pages)
    evaluated = json.loads((folder / "demo/induction/eval.json").read_text())
    assert set(evaluated["active"]) == {"Q0", "K0", "V0", "Q1", "K1", "V1"}
    assert (folder / "restored/model.safetensors").exists()
    assert "Facts and edits" in (folder / "athletes/report/report.html").read_text()


def test_its_python_runs(
    folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_small_world(folder, tiny_model, monkeypatch)
    names: dict[str, object] = {}
    exec(shown("python"), names)
    assert isinstance(names["run"], spdcli.Run)
    assert names["run"].recipe.decompose.steps == 200
    assert capsys.readouterr().out  # progress=print
