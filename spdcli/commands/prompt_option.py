"""`--prompt`, which means the same in every command: a number, a dash, or a text."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import typer

from spdcli.errors import UsageError

NUMBER, ESCAPED = re.compile(r"[0-9]+"), re.compile(r"=+([0-9]+|-)")
MEANING = "N is the run's N-th prompt, - reads a text a line from stdin, anything else is a text; =7 is the text 7"


def prompt_option(about: str, default: str | bool = False, *, several: bool = True) -> Any:
    """The option: what a command does with it, then what its values mean, the same everywhere."""
    again = "; may be repeated" if several else ""
    return typer.Option("--prompt", "-p", help=f"{about}: {MEANING}{again}.", show_default=default)


def read_prompts(values: Sequence[str] | None) -> list[int | str]:
    """The prompts of the option's values: numbers of the run's own, from 1, and texts.

    UsageError where standard input has no line.
    """
    prompts: list[int | str] = []
    for value in values or ():
        if NUMBER.fullmatch(value):
            prompts.append(int(value[:18]))  # Python reads no number of thousands of digits
        elif value == "-":
            prompts += lines_of_input()
        else:
            prompts.append(value[1:] if ESCAPED.fullmatch(value) else value)
    return prompts


def read_prompt(value: str) -> int | str:
    """The prompt of a command that takes one; UsageError where standard input has several."""
    prompts = read_prompts([value])
    if len(prompts) > 1:
        raise UsageError(f"--prompt -: standard input has {len(prompts)} prompts", "this command takes one")
    return prompts[0]


def lines_of_input() -> list[str]:
    """The lines of standard input that are not blank; UsageError where there is none."""
    try:
        lines = [line for line in sys.stdin.read().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt -: not text in UTF-8: {error.reason} at byte {error.start}") from None
    if not lines:
        raise UsageError("--prompt -: standard input has no prompt", "give one a line")
    return lines
