"""What every section of a recipe is, and the types of its numbers, texts and choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from spdcli.engine.tables import Choice

# No number is so large that what it counts could not be held, or listed: a typing error is told before it is obeyed.
MOST = 10**6  # of a width, a length or a number of sequences
Few = Annotated[int, Field(ge=1, le=1000)]  # layers, heads, draws
Size = Annotated[int, Field(ge=1, le=MOST)]
Positive = Annotated[int, Field(ge=1, le=10**9)]  # steps, tokens
Seed = Annotated[int, Field(ge=0, le=2**62)]
Coefficient = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(pattern=r"\S")]


class Section(BaseModel):
    """A table of a recipe: no key but its own, no value that has to be bent into its type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class OneOf:
    """A text that is one of `choices`, as in `Annotated[str, OneOf(DEVICES)]`.

    Its JSON schema tells what each of them means, under `choices`.
    """

    choices: Mapping[str, Choice]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.literal_schema(list(self.choices))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "choices": {name: choice.about for name, choice in self.choices.items()}}
