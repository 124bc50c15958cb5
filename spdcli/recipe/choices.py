"""Settings of a recipe with a few possible values: the values that only a recipe knows, and the type of such a setting.

What the engine can be told stands in `engine.tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import CoreSchema, core_schema

from spdcli.engine.tables import Choice

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler

DEVICES: dict[str, Choice] = {
    "auto": Choice("a GPU if there is one, else the processor"),
    "cpu": Choice("the processor"),
    "cuda": Choice("an NVIDIA GPU"),
}

POSITIONS: dict[str, Choice] = {
    "shortformer": Choice("sinusoids added to what Q and K read, and to nothing else"),
    "added": Choice("sinusoids added to the embedding, before the first block"),
}

DTYPES: dict[str, Choice] = {
    "float32": Choice("4 bytes a number"),
    "float64": Choice("8 bytes a number"),
    "bfloat16": Choice("2 bytes a number, 8 bits of precision"),
}

ANSWERS: dict[str, Choice] = {
    "held_out": Choice("a prompt's last token is what has to be predicted, and is not fed"),
    "fed": Choice("the whole prompt is fed, its last token too"),
}

DIVERGENCES: dict[str, Choice] = {
    "target_to_variant": Choice("KL(target ‖ variant)"),
    "variant_to_target": Choice("KL(variant ‖ target)"),
}

PRECISIONS: dict[str, Choice] = {
    "float32": Choice("every product in float32"),
    "tf32": Choice("on a GPU, products by its tensor cores, whose factors have 10 bits"),
    "bf16": Choice("products in the plan's blocks in bfloat16; importances and losses in float32"),
}


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
