"""README.md cannot drift: its tree is the tree, its examples are real commands."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from spdcli.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NAMED = ("Makefile", "constraints.txt", ".ci/run")


def about(path: Path) -> str:
    """The first sentence a file says about itself: a module's docstring, else its first comment."""
    text = path.read_text()
    if path.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text)) or ""
        return docstring.partition("\n\n")[0].replace("\n", " ")
    comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")]
    return comments[0]


def tree() -> str:
    """One line a file, as the README shows it."""
    paths = [ROOT / name for name in NAMED]
    for room in ("recipes", "spdcli", "tests"):
        paths += sorted(path for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".toml"))
    names = [path.relative_to(ROOT).as_posix() for path in paths if path.read_text().strip()]
    width = max(len(name) for name in names)
    return "\n".join(f"{name:<{width}}  {about(ROOT / name)}" for name in names)


def test_every_file_has_its_line():
    block = re.search(r"## The tree\n.*?```text\n(.*?)\n```", README, re.DOTALL)
    assert block, "README.md has no tree"
    assert block[1] == tree(), f"paste this into README.md:\n{tree()}"


def test_every_file_says_what_it_is():
    silent = [line for line in tree().splitlines() if not line.split(maxsplit=1)[1:]]
    assert not silent


def shown_commands() -> list[str]:
    """The `spd ...` lines of every example block."""
    blocks = re.findall(r"```(?:console|bash)\n(.*?)```", README, re.DOTALL)
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("spd ")]


@pytest.mark.parametrize("line", shown_commands())
def test_shown_commands_exist(line):
    known = {name for name, *_ in COMMANDS} | {"facts", "recipe"}
    assert shlex.split(line, comments=True)[1] in known


def test_commands_are_shown():
    shown = {shlex.split(line, comments=True)[1] for line in shown_commands()}
    assert {name for name, *_ in COMMANDS} <= shown
