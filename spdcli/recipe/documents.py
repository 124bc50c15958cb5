"""TOML files other than recipes: read into a pydantic model, every mistake at once with its line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from spdcli.errors import RecipeError
from spdcli.recipe.reading import Source, parse_toml, read_toml
from spdcli.recipe.toml_lines import key_lines
from spdcli.recipe.wording import Mistake, document_mistakes

Model = TypeVar("Model", bound=BaseModel)


class Kind(NamedTuple):
    """A kind of file: what one is called (`a facts file`), and the hint that goes with its mistakes."""

    name: str
    hint: str


def load_document(
    path: Path, model: type[Model], kind: Kind, check: Callable[[Model], Iterable[Mistake]]
) -> tuple[Model, Source]:
    """The file at `path` as a `model`, and where each of its keys stands.

    `check` gives the mistakes that the model's own types and ranges cannot tell. Raises RecipeError with all mistakes.
    """
    text = read_toml(path, kind.name)
    raw = parse_toml(text, str(path))
    source = Source(str(path), key_lines(text))
    try:
        document = model.model_validate(raw)
        mistakes = list(check(document))
    except ValidationError as error:
        mistakes = document_mistakes(error, raw, model)
        document = None
    if document is None or mistakes:
        problems = [source.problem(mistake.keys, mistake.message) for mistake in mistakes]
        raise RecipeError(sorted(problems, key=lambda problem: problem.line or 0), kind.hint)
    return document, source
