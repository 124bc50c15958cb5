"""Files in CounterFact's format, the data set that papers on editing models report on: JSON, a list or a record a line.

    {"requested_rewrite": {"prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux",
                           "target_true": {"str": "French"}, "target_new": {"str": "English"}},
     "paraphrase_prompts": ["Danielle Darrieux spoke"], "neighborhood_prompts": ["Léon Blum was born to speak"]}

All other keys are ignored. Knows neither torch nor transformers; `edits/editing_scores.py` puts records to a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from spdcli.disk import read_bytes
from spdcli.errors import RecipeError, RecipeProblem, SpdError
from spdcli.recipe.section import Text

SHOWN = 10  # mistakes of a file that are told
HINT = (
    "a record is as in CounterFact: requested_rewrite {prompt, subject, target_true, target_new}, paraphrase_prompts …"
)


def _text_of(target: Any) -> Any:
    """The text of a target, which is `{"str": …}` in CounterFact and may be the text alone."""
    return target["str"] if isinstance(target, dict) and "str" in target else target


Answer = Annotated[Text, BeforeValidator(_text_of)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Rewrite(_Part):
    """What is edited: `prompt` with `{}` for the `subject`, what follows in truth, and what should follow instead."""

    prompt: Annotated[str, Field(pattern=r"\{\}")]
    subject: Text
    target_true: Answer
    target_new: Answer

    @property
    def text(self) -> str:
        """The prompt about its subject."""
        return self.prompt.replace("{}", self.subject)


class Record(_Part):
    """One fact of CounterFact, with prompts that say the same and prompts of other subjects of which it is true."""

    requested_rewrite: Rewrite
    paraphrase_prompts: list[Text] = []
    neighborhood_prompts: list[Text] = []


def load_records(path: Path) -> list[Record]:
    """The records of a file. SpdError for one that cannot be read; RecipeError with the mistakes in it, by line."""
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise SpdError(f"{path}: not text in UTF-8: {error.reason} at byte {error.start}") from None
    problems: list[RecipeProblem] = []
    records: list[Record] = []
    for place, line, raw in _raw_records(text, path):
        try:
            records.append(Record.model_validate(raw))
        except ValidationError as error:
            for one in error.errors():
                key = ".".join(str(part) for part in one["loc"]) or "the record"
                problems.append(RecipeProblem(str(path), line, key, f"{place}{key}: {_expected(one)}"))
    if problems:
        more = [RecipeProblem(str(path), None, "", f"{len(problems) - SHOWN} more mistakes")] * (len(problems) > SHOWN)
        raise RecipeError(problems[:SHOWN] + more, HINT)
    if not records:
        raise SpdError(f"{path}: no records", HINT)
    return records


def _raw_records(text: str, path: Path) -> Iterator[tuple[str, int | None, Any]]:
    """Every record as JSON gives it, with its place in words, or its line where a line is a record."""
    if text.lstrip()[:1] == "[":
        try:
            listed = json.loads(text)
        except json.JSONDecodeError as error:
            raise _no_json(path, error.lineno, error) from None
        for number, raw in enumerate(listed, start=1):
            yield f"record {number}: ", None, raw
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield "", number, json.loads(line)
            except json.JSONDecodeError as error:
                raise _no_json(path, number, error) from None


def _no_json(path: Path, line: int, error: json.JSONDecodeError) -> SpdError:
    return SpdError(f"{path}:{line}:{error.colno}: no JSON: {error.msg}", "a list of records, or one record a line")


def _expected(error: Any) -> str:
    if error["type"] == "missing":
        return "missing"
    if error["type"] == "string_pattern_mismatch":
        wanted = "'{}' where the subject stands" if error["loc"][-1] == "prompt" else "some text"
        return f"expected {wanted}, not {error['input']!r}"
    return f"{error['msg'].removeprefix('Input should be ')} expected, not {error['input']!r}"
