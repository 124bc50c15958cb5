"""What the documents print: their Markdown files, the fenced blocks in them, and the `spd` commands in those."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import typer

from spdcli.cli import app
from spdcli.errors import SpdError
from spdcli.recipe.overrides import parse_override
from spdcli.recipe.schema import Recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BOXES = re.compile("[\u2500-\u257f]")
TYPED = {"bash", "console", "toml", "python", "json", "yaml"}  # languages of blocks that people write
COMMANDS = ("spd", "make", "pip", "python", "git", "cd", "source", "torchrun", "srun")


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line that it begins on."""

    language: str
    text: str
    line: int


def blocks(markdown: str) -> list[Block]:
    """The fenced blocks of a document, in order."""
    matches = re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", markdown, re.DOTALL | re.MULTILINE)
    return [Block(match[2], match[3], markdown[: match.start()].count("\n") + 1) for match in matches]


def without_generated_parts(markdown: str) -> str:
    """A document without what stands between `<!-- NAME -->` and `<!-- /NAME -->`."""
    return re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", markdown, flags=re.DOTALL)


def pasted_output(markdown: str) -> list[str]:
    """Lines of a document that look like what a command printed: nobody types those, and results are recorded."""
    suspects = [line for line in markdown.splitlines() if BOXES.search(line)]
    for block in blocks(markdown):
        if block.language not in TYPED:
            suspects.append(f"line {block.line}: a block of {block.language or 'no language'}")
        elif block.language in ("bash", "console"):
            suspects += commands_and_output(block)[1]
    return suspects


def commands_and_output(block: Block) -> tuple[list[str], list[str]]:
    """The commands of a block, each on one line, and what is neither command nor comment."""
    commands: list[str] = []
    output = []
    for line in block.text.replace("\\\n", " ").splitlines():
        text = line.strip().removeprefix("$ ") if block.language == "bash" or line.startswith("$ ") else None
        if text is None or (text and not text.startswith("#") and text.split()[0] not in COMMANDS):
            output += [line] if line.strip() else []
        elif text and not text.startswith("#"):
            commands.append(text)
    return commands, output


def spd_commands(markdown: str) -> list[str]:
    """Every `spd` command in the blocks of a document."""
    typed = [block for block in blocks(markdown) if block.language in ("bash", "console")]
    lines = [line for block in typed for line in commands_and_output(block)[0]]
    return [line for line in lines if line.startswith("spd ")]


def mistakes(command: str) -> list[str]:
    """What is wrong with an `spd` command as it is printed: its name, its options, their values, its settings."""
    words = shlex.split(re.split(r" [|>] ", command)[0], comments=True)[1:]
    group, context = spd()
    while hasattr(group, "commands"):
        if not words or words[0] not in group.commands:
            return [f"{command}: no command {' '.join(words[:1])}"]
        name, group = words[0], group.commands[words[0]]
        words = words[1:]
    try:
        group.make_context(name, list(words), parent=context)
    except (typer.TyperException, SpdError) as error:
        return [f"{command}: {error}"]
    settings = [words[nth + 1] for nth, word in enumerate(words) if word in ("--set", "--with")]
    return [f"{command}: no setting {setting}" for setting in settings if not is_setting(setting)]


@cache
def spd() -> tuple[Any, typer.Context]:
    """The `spd` command itself, and a context to parse its subcommands in."""
    group = typer.main.get_command(app)
    return group, typer.Context(group, info_name="spd")


def is_setting(text: str) -> bool:
    """Whether `a.b=value` names a key of a recipe."""
    return ".".join(str(part) for part in parse_override(text).path) in recipe_keys()


@cache
def recipe_keys() -> set[str]:
    """Every key of a recipe, dotted."""
    schema = Recipe.model_json_schema()
    keys = set()
    for name, entry in schema["properties"].items():
        references = [one["$ref"] for one in entry.get("oneOf", entry.get("anyOf", [entry])) if "$ref" in one]
        keys |= {f"{name}.{key}" for ref in references for key in schema["$defs"][ref.split("/")[-1]]["properties"]}
        keys |= set() if references else {name}
    return keys
