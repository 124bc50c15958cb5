"""Inputs of the feature toys: vectors of features that are mostly 0, seeded."""

from __future__ import annotations

import torch
from torch import Tensor

from spdcli.engine.target import Batch
from spdcli.errors import UsageError

PROBE = 0.75  # what a feature is set to when it is looked at alone, as in Figures 8 and 12 of the first SPD paper


def sparse_features(count: int, features: int, probability: float, lowest: float, generator: torch.Generator) -> Batch:
    """`count` inputs of one position each, `[count, 1, features]`.

    A feature is on with `probability`, by itself, and then uniform from `lowest` to 1; else it is 0.
    """
    values = lowest + (1 - lowest) * torch.rand(count, 1, features, generator=generator)
    on = torch.rand(count, 1, features, generator=generator) < probability
    return Batch.everywhere(values * on)


def single_features(features: int) -> Batch:
    """Every feature alone at PROBE, one input each: `[features, 1, features]`."""
    return Batch.everywhere(PROBE * torch.eye(features)[:, None])


def read_features(text: str, features: int) -> Tensor:
    """The input `[features]` that a text writes: features that are on, as in `3 7:0.5`; PROBE where no value stands.

    UsageError names the word that is none.
    """
    values = torch.zeros(features)
    for word in text.split():
        name, colon, number = word.partition(":")
        try:
            value = float(number) if colon else PROBE
        except ValueError:
            value = float("nan")
        if not (name.isdecimal() and int(name) < features) or value != value:
            raise UsageError(
                f"no feature {word!r}", f"an input is such as '3 7:0.5'; the features are 0 to {features - 1}"
            )
        values[int(name)] = value
    return values


def find_feature(inputs: Tensor, query: str) -> list[tuple[int, int]]:
    """Every `(input, position)` where a feature of `inputs` `[B, F]` is on; UsageError where it is nowhere."""
    features = inputs.shape[1]
    if not (query.isdecimal() and int(query) < features):
        raise UsageError(f"no feature {query!r}", f"the features are 0 to {features - 1}")
    rows = inputs[:, int(query)].nonzero()[:, 0].tolist()
    if not rows:
        raise UsageError(f"no input has feature {query}")
    return [(row, 0) for row in rows]


def written_features(values: Tensor) -> str:
    """An input `[features]` as `read_features` reads it."""
    on = values.nonzero()[:, 0].tolist()
    return " ".join(f"{feature}:{values[feature].item():.4g}" for feature in on)
