"""`--prompt` by hand: numbers, texts, the dash and the escape; and every command that has it has the same one."""

from __future__ import annotations

import io

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from spdcli.cli import app
from spdcli.commands.prompt_option import MEANING, read_prompt, read_prompts
from spdcli.errors import UsageError


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ("2", 2),
        ("0", 0),
        ("007", 7),
        ("9" * 5000, int("9" * 18)),
        ("Kobe Bryant plays", "Kobe Bryant plays"),
        ("3 s 1 4 s", "3 s 1 4 s"),
        ("", ""),
        (" 2", " 2"),
        ("-2", "-2"),
        ("²", "²"),
        ("=2024", "2024"),
        ("=-", "-"),
        ("==7", "=7"),
        ("=x", "=x"),
        ("=", "="),
    ],
)
def test_a_value_is_a_number_or_a_text(value: str, prompt: int | str) -> None:
    assert read_prompts([value]) == [prompt]
    assert read_prompt(value) == prompt


@given(st.text(alphabet="=-0123456789 a", max_size=6))
def test_every_text_can_be_given(text: str) -> None:
    assert [text] in (read_prompts([f"={text}"]), [] if text == "-" else read_prompts([text]))


def test_the_dash_reads_texts_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n 1984\n1984\n"))
    assert read_prompts(["2", "-", "two"]) == [2, "one", " 1984", "1984", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert read_prompt("-") == "one"
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    with pytest.raises(UsageError, match="standard input has 2 prompts"):
        read_prompt("-")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    with pytest.raises(UsageError, match="not text in UTF-8"):
        read_prompts(["-"])
    assert read_prompts(None) == []


def test_every_command_says_the_same_of_it() -> None:
    group = typer.main.get_command(app)
    own = {
        name: option.help
        for name, command in group.commands.items()  # type: ignore[attr-defined]
        for option in command.params
        if "--prompt" in option.opts
    }
    assert own.keys() == {"ablate", "explore", "graph", "inspect", "locate", "suppress", "trace"}
    assert all(MEANING in text for text in own.values())
