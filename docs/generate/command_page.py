"""The command reference: every command with its help, its options and its examples, from the Typer app itself."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any, NamedTuple

import typer

from generate.markdown import code, fenced, joined, prose, table
from spdcli.cli import app

NOTE = "<!-- Generated from the commands themselves by `make results`. -->"
ABOUT = """\
Results go to standard output and everything else to standard error. `--json` prints one object (see
[JSON](json.md)), `-q` the result's line alone, so that commands chain:
`spd eval "$(spd decompose induction-quick -q)"`.

Exit codes: 0 done; 1 it ran and the answer is no (an expectation failed, a bound is broken, a recipe does not fit), or
it could not be done; 2 usage, a recipe, or a run or file that is named and not there; 130 interrupted. An expected
error is one line that names file, line and key; `SPD_DEBUG=1` shows a traceback.
"""
SHARED = 5  # commands that must have an option before it is described once for all


class Option(NamedTuple):
    """One argument or option: how it is written, and what its help says of it."""

    form: str
    help: str


class Command(NamedTuple):
    """One command with its full name."""

    name: str
    panel: str
    help: str
    examples: str
    usage: str
    options: tuple[Option, ...]


def page() -> str:
    """The whole page."""
    every = commands()
    counts = Counter(option for command in every for option in command.options)
    shared = [option for option, count in counts.items() if count >= SHARED]
    parts = [NOTE, "# Commands", ABOUT]
    for panel in dict.fromkeys(command.panel for command in every):
        own = [command for command in every if command.panel == panel]
        lines = [f"- [`spd {c.name}`](#{c.name.replace(' ', '-')}): {c.help.partition(chr(10))[0]}" for c in own]
        parts += [f"**{panel}**", "\n".join(lines)]
    parts += ["## Options that many commands share", options_table(shared)]
    return joined([*parts, *(section(command, shared) for command in every)]) + "\n"


def commands() -> list[Command]:
    """Every command of the app, those of its groups (`recipe ls`) included, in the order of `spd --help`."""
    root: Any = typer.main.get_command(app)
    context = typer.Context(root, info_name="spd")
    return [leaf for name, command in root.commands.items() for leaf in leaves(command, name, context, "")]


def leaves(command: Any, name: str, parent: typer.Context, panel: str) -> list[Command]:
    """The command itself, or those of a group."""
    context = typer.Context(command, info_name=name, parent=parent)
    panel = command.rich_help_panel or panel
    if hasattr(command, "commands"):
        return [leaf for one, inner in command.commands.items() for leaf in leaves(inner, one, context, panel)]
    records = [parameter.get_help_record(context) for parameter in command.params if not parameter.hidden]
    options = tuple(Option(*record) for record in records if record)
    places = [one.metavar or one.name.upper() for one in command.params if one.param_type_name == "argument"]
    full = context.command_path.removeprefix("spd ")
    usage = " ".join(["spd", full, *places, "[OPTIONS]"])
    return [Command(full, str(panel), inspect.cleandoc(command.help or ""), command.epilog or "", usage, options)]


def section(command: Command, shared: list[Option]) -> str:
    """One command: usage, what it does, its options, lines to copy."""
    own = [option for option in command.options if option not in shared]
    others = [code(option.form.partition(" ")[0].rstrip(",")) for option in command.options if option in shared]
    return joined(
        [
            f'## spd {command.name} <a id="{command.name.replace(" ", "-")}"></a>',
            command.help,
            fenced("text", command.usage),
            options_table(own) if own else "",
            f"Also {', '.join(others)}." if others else "",
            fenced("bash", command.examples),
        ]
    )


def options_table(options: list[Option]) -> str:
    """A row an option."""
    return table(["option", ""], [[code(option.form), prose(option.help)] for option in options], words=2)
