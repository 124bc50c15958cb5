"""What messages say of commands is true: every `spd …` and every `--option` in the sources is there to be used."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from printed import ROOT, is_setting, spd

from spdcli.errors import RecipeError
from spdcli.recipe.reading import load_recipe, shipped

PROSE = {"are", "does", "if", "reads"}  # words after "spd" where it is the program that is spoken of, and no command
ENDS = ",;:.`"  # of a clause
FILLED_IN = "X"  # in the place of what an f-string fills in
SOURCES = sorted((ROOT / "spdcli").rglob("*.py"))


class Said(NamedTuple):
    """A text in the sources that is no docstring: its file, its line, and what it says."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.text}"


def said_in(path: Path) -> Iterator[Said]:
    """Every text of a file but its docstrings; f-strings whole."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    skipped = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    skipped |= {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield Said(path, node.lineno, node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else FILLED_IN for part in node.values]
            yield Said(path, node.lineno, "".join(map(str, parts)))


class Command(NamedTuple):
    """A command: its name, the module that it is in, and whether its options take a value, by their names."""

    name: str
    module: str
    options: dict[str, bool]


@cache
def commands() -> dict[str, Command]:
    """Every command by its words, as `facts check`."""
    found = {}

    def walk(group: Any, words: tuple[str, ...]) -> None:
        for name, one in group.commands.items():
            if hasattr(one, "commands"):
                walk(one, (*words, name))
                continue
            spelled = {spelling: option for option in one.params for spelling in (*option.opts, *option.secondary_opts)}
            options = {spelling: not getattr(option, "is_flag", False) for spelling, option in spelled.items()}
            full = " ".join((*words, name))
            found[full] = Command(full, one.callback.__module__, {"--help": False, **options})

    walk(spd()[0], ())
    return found


def mistakes_of_commands(text: str) -> list[str]:
    """What is wrong with the command lines in a text: a command, an option or a setting that is not there."""
    found = []
    for match in re.finditer(r"(?<![\w/.-])spd (?=[a-z])", text):
        words = re.findall(r"'[^']*'|\S+", text[match.end() :].partition("\n")[0])
        first = words[0].strip(",;:.`'")
        if first in PROSE:
            continue
        name = next((one for one in (" ".join(map(bare, words[:2])), first) if one in commands()), None)
        if name is None:
            groups = {one.split()[0] for one in commands()}
            found += [] if first in groups and len(words) == 1 else [f"no command {first}"]
            continue
        of_name = len(name.split())
        if words[of_name - 1][-1] not in ENDS:
            found += mistakes_of_words(commands()[name], words[of_name:])
    return found


def bare(word: str) -> str:
    """A word without the punctuation around it."""
    return word.strip(",;:.`'()")


def mistakes_of_words(command: Command, words: list[str]) -> list[str]:
    """What is wrong with the options among the words that follow a command, up to the end of its clause."""
    found, value_of = [], None
    for word in words:
        if value_of == "--set" and "=" in word and not is_setting(bare(word)):
            found.append(f"no setting {bare(word)}")
        if bare(word).startswith("--") and bare(word) not in command.options:
            found.append(f"{command.name} has no {bare(word)}")
        value_of = bare(word) if command.options.get(bare(word)) else None
        if word[-1] in ENDS or word in ("|", ">"):
            break
    return found


def mistakes_of_options(said: Said) -> list[str]:
    """Options in a text that no command has, or not the one in whose file it stands."""
    module = ".".join(said.path.relative_to(ROOT).with_suffix("").parts)
    own = [one for one in commands().values() if one.module == module] or list(commands().values())
    there = {option for one in own for option in one.options} | {"--version"}
    if re.search(r"(?<![\w/.-])spd [a-z]", said.text) or "pip install" in said.text:
        there |= {option for one in commands().values() for option in one.options} | {"--no-deps"}
    return [f"no option {one}" for one in re.findall(r"(?<![\w-])--[a-z][a-z-]*", said.text) if one not in there]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_and_option_that_is_spoken_of_is_there(path: Path) -> None:
    wrong = {str(said): mistakes_of_commands(said.text) + mistakes_of_options(said) for said in said_in(path)}
    assert {said: mistakes for said, mistakes in wrong.items() if mistakes} == {}


@pytest.mark.parametrize(
    ("text", "mistakes"),
    [
        ("spd train RECIPE --out X --resume goes on", []),
        ("spd evil RUN", ["no command evil"]),
        ("run `spd eval X --prompt 1`", ["eval has no --prompt"]),
        ("spd decompose X --set decompose.stepz=3, or not", ["no setting decompose.stepz=3"]),
        ("spd facts check MODEL --rank 3 says it", []),
        ("spd facts check MODEL --top 3", ["facts check has no --top"]),
        ("spd reads mlp; spd eval, inspect and --nothing", []),
    ],
)
def test_a_mistake_is_seen(text: str, mistakes: list[str]) -> None:
    assert mistakes_of_commands(text) == mistakes


def test_an_option_of_another_command_is_seen() -> None:
    locate = ROOT / "spdcli/commands/locate.py"
    assert mistakes_of_options(Said(locate, 1, "--resume goes on")) == ["no option --resume"]
    assert mistakes_of_options(Said(ROOT / "spdcli/disk.py", 1, "--resume goes on")) == []


@pytest.mark.parametrize("name", shipped())
def test_a_wrong_setting_names_the_recipe_that_was_given(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(name, ["losses.bogus=1"])
    assert raised.value.hint == f"`spd recipe show {name}` prints its settings"
    own = tmp_path / "mine.toml"
    own.write_bytes(shipped()[name].read_bytes())
    with pytest.raises(RecipeError) as raised:
        load_recipe(own, ["losses.bogus=1"])
    assert raised.value.hint == f"`spd recipe show {own}` prints its settings"
    own.write_text(f"{own.read_text()}\n[bogus]\n")
    with pytest.raises(RecipeError) as raised:
        load_recipe(own)
    example = re.fullmatch(r"`spd recipe show (\S+)` prints a recipe that works", raised.value.hint or "")
    assert example is not None
    assert load_recipe(example[1]).recipe.target.kind == load_recipe(name).recipe.target.kind
