"""Every figure of the paper has its place: a function that says so, or a file, and a command that is there."""

from __future__ import annotations

import re
import shlex
from pkgutil import resolve_name

import pytest
import typer
from small_runs import ROOT

from spdcli.cli import app
from spdcli.figures.table import FIGURES

COMMANDS = typer.main.get_command(app).commands


def test_the_figures_are_those_of_the_paper():
    assert [figure.number for figure in FIGURES] == list(range(1, 11))
    assert len({figure.shows for figure in FIGURES}) == 10


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: str(figure.number))
def test_a_figure_is_drawn_by_a_function_that_names_it_or_is_a_file(figure):
    assert bool(figure.drawn_by) != bool(figure.file)
    if figure.file:
        assert (ROOT / figure.file).is_file()
    else:
        named = re.search(r"Figures? ([\d, and]+)", resolve_name(figure.drawn_by).__doc__)
        assert str(figure.number) in re.findall(r"\d+", named[1])


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: str(figure.number))
def test_a_figures_command_and_its_options_are_there(figure):
    program, name, *arguments = shlex.split(figure.command)
    assert program == "spd"
    command = COMMANDS[name]
    if hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= options
    assert command.help
