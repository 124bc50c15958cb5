"""The errors a user can cause: one line each, with a hint, and the exit code that goes with it."""

from __future__ import annotations


class SpdError(Exception):
    """An expected failure. `message` is one line; `hint` says what to do next.

    Exit codes: 1 when the command ran and the answer is no, 2 for usage and recipes.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SpdError):
    """The command line asks for something that cannot be: a wrong value, a token that is nowhere."""

    exit_code = 2


class RecipeProblem:
    """One mistake in a recipe: where it is, what is wrong, what would be right."""

    def __init__(self, source: str, line: int | None, key: str, message: str) -> None:
        self.source = source
        self.line = line
        self.key = key
        self.message = message

    def __str__(self) -> str:
        place = self.source if self.line is None else f"{self.source}:{self.line}"
        return f"{place}: {self.message}"


class RecipeError(SpdError):
    """Every mistake of a recipe at once, one line each."""

    exit_code = 2

    def __init__(self, problems: list[RecipeProblem], hint: str | None = None) -> None:
        super().__init__("\n".join(str(problem) for problem in problems), hint)
        self.problems = problems
