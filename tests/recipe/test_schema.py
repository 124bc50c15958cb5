"""The schema: every key of a recipe says what it means, and losses and choices are those of the tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import pytest
from pydantic import BaseModel, ValidationError

from spdcli.engine.part_tables import STARTS
from spdcli.engine.tables import LOSSES
from spdcli.recipe.choices import DEVICES
from spdcli.recipe.losses import Losses
from spdcli.recipe.schema import Recipe
from spdcli.recipe.section import OneOf, Section


def keys() -> Iterator[tuple[str, dict]]:
    """Every key of every section, with its JSON schema."""
    schema = Recipe.model_json_schema()
    for section, definition in {"recipe": schema, **schema["$defs"]}.items():
        for key, entry in definition["properties"].items():
            yield f"{section}.{key}", entry


KEYS = dict(keys())


@pytest.mark.parametrize("key", KEYS)
def test_every_key_says_what_it_means(key: str) -> None:
    description = KEYS[key]["description"]
    assert description.endswith(".")
    assert len(description.split()) > 2


def test_every_choice_says_what_it_means() -> None:
    chosen = {key: entry for key, entry in KEYS.items() if "enum" in entry}
    for key, entry in chosen.items():
        assert set(entry["choices"]) == set(entry["enum"]), key
        assert all(entry["choices"].values()), key
    assert KEYS["Slices.init"]["enum"] == list(STARTS)


def test_coefficients_are_the_table_of_losses() -> None:
    assert list(Losses.model_fields)[: len(LOSSES)] == list(LOSSES)
    losses = Losses(recon=0.5, attention=2.0)
    assert losses.coefficients == dict.fromkeys(LOSSES, 0.0) | {"recon": 0.5, "attention": 2.0}
    for name, loss in LOSSES.items():
        assert f"({loss.equation})" in KEYS[f"Losses.{name}"]["description"]


def test_one_of_a_table_is_told_as_a_literal_is() -> None:
    class Place(BaseModel):
        device: Annotated[str, OneOf(DEVICES)] = "auto"

    assert Place(device="cuda").device == "cuda"
    for wrong in ("gpu", 3, None):
        with pytest.raises(ValidationError) as caught:
            Place(device=wrong)  # type: ignore[arg-type]
        assert [error["type"] for error in caught.value.errors()] == ["literal_error"]


def test_sections_are_strict() -> None:
    assert issubclass(Losses, Section)
    with pytest.raises(ValidationError):
        Losses(reconn=1.0)  # type: ignore[call-arg]


def whole_numbers(entry: dict) -> Iterator[dict]:
    """The parts of a key's JSON schema that are whole numbers."""
    for option in (entry, *entry.get("anyOf", ())):
        if option.get("type") == "integer":
            yield option


def test_every_whole_number_has_an_end() -> None:
    numbers = {key: part for key, entry in KEYS.items() for part in whole_numbers(entry)}
    assert len(numbers) > 30
    for key, part in numbers.items():
        assert part["maximum"] <= 2**62, key
        assert key == "recipe.seed" or part["maximum"] <= 10**9, key
