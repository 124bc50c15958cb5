"""The sections [target] of planted models: transformers put together by hand from slices that are known."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from spdcli.recipe.section import MOST, Coefficient, Section, Size


class PlantedInductionTarget(Section):
    """Exact induction whose slices are known: two blocks of attention, put together by hand in random directions."""

    kind: Literal["planted_induction"] = Field(description="This kind of target: induction, planted.")
    tokens: Annotated[int, Field(ge=2, le=MOST)] = Field(8, description="Ordinary tokens, each with a slice of V1.")
    triggers: Size = Field(2, description="Tokens that induction completes, with slices of V0, Q1 and K1 each.")
    length: Annotated[int, Field(ge=6, le=MOST)] = Field(
        8, description="Tokens of a sequence; each place of s1 has a slice."
    )
    d_model: Size = Field(32, description="Width of the residual stream, which holds every direction.")
    skew: Coefficient = Field(0.3, description="How far directions are from orthogonal; 0 is orthogonal.")
    strength_ratio: Annotated[float, Field(ge=1)] = Field(
        4.0, description="The strongest slice of a matrix is so many times as strong as its weakest."
    )
    sink: bool = Field(
        True, description="Whether queries that find no key attend to nothing, in place of all keys alike."
    )


class PlantedLookupTarget(Section):
    """A lookup in two hops whose slices are known: two MLPs, put together by hand in random directions."""

    kind: Literal["planted_lookup"] = Field(description="This kind of target: a lookup, planted.")
    subjects: Annotated[int, Field(ge=3, le=MOST)] = Field(
        10, description="Subjects, each with a slice of every matrix."
    )
    tokens: Size = Field(30, description="Tokens, which name one or two subjects; at least one a subject.")
    length: Annotated[int, Field(ge=2, le=MOST)] = Field(8, description="Tokens of a sequence.")
    d_model: Size = Field(32, description="Width of the residual stream, which holds every direction.")
    skew: Coefficient = Field(0.3, description="How far directions are from orthogonal; 0 is orthogonal.")
    strength_ratio: Annotated[float, Field(ge=1)] = Field(
        4.0, description="The strongest slice of a matrix is so many times as strong as its weakest."
    )
