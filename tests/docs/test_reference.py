"""The references are whole: every key of a recipe and every option of a command, with a sentence each."""

from __future__ import annotations

import pytest
import typer
from generate import command_page, recipe_page
from printed import recipe_keys

from spdcli.cli import app
from spdcli.recipe.schema import Recipe


def rows(page: str) -> list[list[str]]:
    """The cells of every table row of a page."""
    return [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("|")]


def test_every_key_of_a_recipe_has_a_row() -> None:
    page = recipe_page.page()
    keys = {row[0].strip(" `") for row in rows(page)}
    assert {key.rpartition(".")[2] for key in recipe_keys()} <= keys
    schema = Recipe.model_json_schema()
    sections = [section for section in schema["$defs"].values()]
    assert page.count("## `[") == len(sections)
    assert all(section["description"] in page for section in sections)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"type": "integer", "exclusiveMinimum": 0}, "whole number > 0"),
        ({"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}]}, "number ≥ 0 and ≤ 1"),
        ({"enum": ["auto", "cpu"], "type": "string"}, '`"auto"`, `"cpu"`'),
        ({"type": "array", "items": {"type": "string", "pattern": "\\S"}}, "list of text"),
        ({"anyOf": [{"type": "number"}, {"const": "auto"}]}, 'number or `"auto"`'),
        ({"type": "boolean"}, "true or false"),
    ],
)
def test_values_in_words(entry: dict, words: str) -> None:
    assert recipe_page.values(entry) == words


@pytest.mark.parametrize(
    ("value", "written"), [(None, "not set"), (True, "`true`"), (1e-12, "`1e-12`"), ("a", '`"a"`'), (["*"], '`["*"]`')]
)
def test_defaults_as_a_recipe_writes_them(value: object, written: str) -> None:
    assert recipe_page.literal(value) == written


def test_every_command_and_every_option_has_its_line() -> None:
    page = command_page.page()
    group = typer.main.get_command(app)
    tops = {name for name, command in group.commands.items() if not hasattr(command, "commands")}  # type: ignore[attr-defined]
    described = {command.name for command in command_page.commands()}
    assert tops | {"recipe check", "facts ls"} <= described
    for command in command_page.commands():
        assert f"## spd {command.name} " in page
        assert command.help and command.examples, command.name
        for option in command.options:
            assert option.help, f"spd {command.name} {option.form}"
            assert f"`{option.form.split(' <')[0]}" in page or "|" in option.form
