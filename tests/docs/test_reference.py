"""The references are whole: every key of a recipe and every option of a command, with a sentence each."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass, field
from types import FunctionType
from typing import Generic, Literal, TypeVar

import pytest
import typer
from generate import command_page, json_page, names_page, recipe_page
from generate.declared_shapes import lines_of, outputs
from generate.markdown import prose
from printed import ROOT, recipe_keys

from spdcli import HOMES, Run
from spdcli.cli import app
from spdcli.recipe.schema import Recipe
from spdcli.records import ABSENT, Absent, spread

Value = TypeVar("Value")


@dataclass(frozen=True)
class Pair(Generic[Value]):
    """A generic record."""

    one: Value
    other: Value


@dataclass(frozen=True)
class Row:
    """A record with a key that may be absent, one that is spread, and one of every other kind."""

    name: str
    both: Pair[float]
    size: dict[str, float] = field(metadata=spread("{}_size"))
    note: str | Absent = ABSENT
    bounds: tuple[float, float] | None = None
    kind: Literal["a", "b"] = "a"
    rows: list[list[float]] = field(default_factory=list)


def rows(page: str) -> list[list[str]]:
    """The cells of every table row of a page."""
    return [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("|")]


def test_every_key_of_a_recipe_has_a_row() -> None:
    page = recipe_page.page()
    keys = {row[0].strip(" `") for row in rows(page)}
    assert {key.rpartition(".")[2] for key in recipe_keys()} <= keys
    schema = Recipe.model_json_schema()
    sections = list(schema["$defs"].values())
    assert page.count("## `[") == len(sections)
    assert all(prose(section["description"]) in page for section in sections)
    assert [row for row in rows(page) if len(row) == 4 and not row[3].strip(" |")] == [], "a key without a description"


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
        assert command.help, command.name
        assert command.examples, command.name
        for option in command.options:
            assert option.help, f"spd {command.name} {option.form}"
            assert f"`{option.form.split(' <')[0]}" in page or "|" in option.form


def test_the_shape_of_an_object_by_hand() -> None:
    data = {
        "schema": "spd.x/1",
        "unique": {"Q0": 1, "K0": 2},
        "rows": [{"name": "a", "kl": None}, {"name": "b", "kl": 0.5, "best": True}],
        "empty": [],
    }
    assert json_page.shape(data) == [
        "{",
        "  schema: text",
        "  unique: {",
        "    <matrix>: number",
        "  }",
        "  rows: [{",
        "    name: text",
        "    kl: number",
        "    best: true or false",
        "  }, …]",
        "  empty: []",
        "}",
    ]


def test_the_shape_of_a_record_by_hand() -> None:
    assert lines_of({"rows": [Row], "recipe?": "{…}", "saved": None}) == [
        "{",
        "  rows: [{",
        "    name: text",
        "    both: {",
        "      one: number",
        "      other: number",
        "    }",
        "    <key>_size: number",
        "    note?: text",
        "    bounds: [number, number] or null",
        "    kind: text",
        "    rows: [[number, …], …]",
        "  }, …]",
        "  recipe?: {…}",
        "  saved: null",
        "}",
    ]


def test_what_has_no_form_in_json_is_refused() -> None:
    with pytest.raises(TypeError, match="no shape"):
        lines_of({"x": complex})


def test_every_output_has_its_shape_whether_it_was_recorded_or_not() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "spdcli").rglob("*.py"))
    printed = set(re.findall(r'"spd\.[a-z.]+/\d"', sources)) - {
        '"spd.facts.table/1"',
        '"spd.recovery/1"',
        '"spd.target/1"',
    }  # files of a run
    assert {keys["schema"] for keys in outputs().values()} == printed | {
        '"spd.soak/1"',
        '"spd.walk/1"',
    }  # which tests print
    page = json_page.page()
    headings = [heading.replace("`", "") for heading in re.findall("^## (.*)$", page, re.MULTILINE)]
    assert headings == list(outputs())
    assert all(len(lines_of(keys)) > 3 for keys in outputs().values())
    described = {command.name for command in command_page.commands()}
    assert all(any(name.startswith(f"spd {verb}") for name in outputs()) for verb in described)


@pytest.mark.parametrize("name", json_page.recorded_outputs())
def test_what_was_recorded_has_the_keys_that_are_declared(name: str) -> None:
    _, data = json_page.recorded_outputs()[name]
    declared = outputs()[name]
    assert data.keys() <= {key.rstrip("?") for key in declared}
    assert {key for key in declared if not key.endswith("?")} <= data.keys()


CODE = '''
def plain(x: int, *, y: float | None = None) -> str:
    """Two words: see Eq. 4 `x`. More.

    And more."""

class Base(Exception):
    """A base."""

class Record:
    """A record."""
    x: int
    y: str = ""

    @property
    def size(self) -> int:
        """Its size."""

    @classmethod
    def made(cls, x: int) -> Record:
        """Makes one."""

    def silent(self) -> None: ...

def _private() -> None:
    """Nobody's."""
'''


def test_names_of_a_module_by_hand() -> None:
    names = [one for node in ast.parse(CODE).body for one in names_page.of_node(node)]
    assert [(one.name, one.signature, one.about) for one in names] == [
        ("plain", "(x: int, *, y: float | None = None) -> str", "Two words: see Eq. 4 `x`."),
        ("Base(Exception)", "", "A base."),
        ("Record", "(x: int, y: str)", "A record."),
        ("Record.size", "int", "Its size."),
        ("Record.made", "(x: int) -> Record", "Makes one."),
    ]


def shown_names() -> set[str]:
    """The functions and classes in the tables of the Python reference."""
    places = [place for part in names_page.PYTHON.values() for place in part]
    return {one.name.partition("(")[0] for place in places for one in names_page.names(place)}


@pytest.mark.parametrize("name", HOMES)
def test_a_name_of_the_door_is_in_the_python_reference(name: str) -> None:
    assert name in shown_names()


def methods_of_a_run() -> list[FunctionType]:
    """The public methods of `Run` and of its bases in the same room."""
    methods = [one for _, one in inspect.getmembers(Run, inspect.isfunction) if one.__module__.split(".")[1] == "run"]
    return [one for one in methods if not one.__name__.startswith("_")]


def test_a_run_has_one_table_of_its_methods_with_those_of_its_bases() -> None:
    shown = {one.name for one in names_page.names("spdcli.run.Run")}
    methods = {f"Run.{one.__name__}" for one in methods_of_a_run()}
    assert {"Run.save", "Run.evaluate", "Run.suppress"} <= methods
    assert methods <= shown


def test_what_a_run_returns_is_in_the_python_reference() -> None:
    returned = " ".join(str(one.__annotations__["return"]) for one in methods_of_a_run())
    names = {
        name
        for name in re.findall(r"\w+", returned)
        if name not in ("nn", "Module", "Tensor", "Iterator", "Path", "None")
    }
    records = {name for name in names if name[0].isupper()}
    assert len(records) >= 8
    assert records <= shown_names()


@pytest.mark.parametrize("page", [names_page.python_page(), names_page.engine_page()])
def test_every_directive_has_its_table(page: str) -> None:
    places = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    assert len(places) >= 10
    for place in places:
        assert names_page.names(place), place
        assert all(one.about for one in names_page.names(place)), place
