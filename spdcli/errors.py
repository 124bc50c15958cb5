"""The errors a user can cause: one line each, with a hint, and the exit code that goes with it."""

from __future__ import annotations


class SpdError(Exception):
    """An expected failure. `message` is one line; `hint` says what to do next.

    Exit codes: 1 when the command ran and the answer is no, or it could not be done; 2 for usage, recipes, and what is
    named and not there; 130 when interrupted.
    """

    exit_code = 1
    label = "error"

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SpdError):
    """The command line asks for something that cannot be: a wrong value, a token that is nowhere."""

    exit_code = 2


class Missing(UsageError):
    """A run, a file or a model that the command line or a recipe names is not there."""


class NotFinite(SpdError):
    """A loss or a gradient is not finite at `step` (from 1); the parameters are those of the step before."""

    def __init__(self, message: str, hint: str, step: int) -> None:
        super().__init__(message, hint)
        self.step = step


class Collapsed(SpdError):
    """Training will come to nothing as it is, which was seen at `step`."""

    def __init__(self, message: str, hint: str, step: int) -> None:
        super().__init__(message, hint)
        self.step = step


class LostProcess(SpdError):
    """Of several processes that make a run together another one is gone, which has a reason of its own."""


class Interrupted(SpdError):
    """Ctrl-C, after the work was saved: `message` says how far it came, `hint` how to go on."""

    exit_code = 130
    label = "interrupted"


class RecipeProblem:
    """One mistake in a recipe: where it is, what is wrong, what would be right.

    `source` is a file, or the option that set the value; `key` is dotted, as in `losses.recon`.
    """

    def __init__(self, source: str, line: int | None, key: str, message: str, column: int | None = None) -> None:
        self.source = source
        self.line = line
        self.key = key
        self.message = message
        self.column = column

    def __str__(self) -> str:
        place = [self.source, *(str(number) for number in (self.line, self.column) if number is not None)]
        return f"{':'.join(place)}: {self.message}".replace("\n", r"\n")


LISTED = 20  # mistakes of one recipe that are told


class RecipeError(SpdError):
    """Every mistake of a recipe at once, one line each, of the first LISTED."""

    exit_code = 2

    def __init__(self, problems: list[RecipeProblem], hint: str | None = None) -> None:
        lines = [str(problem) for problem in problems[:LISTED]]
        if len(problems) > LISTED:
            lines.append(f"{problems[0].source}: and {len(problems) - LISTED:,} more mistakes")
        super().__init__("\n".join(lines), hint)
        self.problems = problems[:LISTED]
