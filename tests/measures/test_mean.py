"""Means over batches."""

from __future__ import annotations

import math

import pytest
import torch
from slow_evaluation import CPU, FLOAT32, LOSSES, NOISE, TOY, kl, masked, stand_ins, steady_noise, unsettle  # noqa: F401

from spdcli.measures.mean import Mean


def test_a_mean_and_its_error_do_not_depend_on_the_batches():
    values = torch.randn(20) + 3
    whole, parts = Mean(), Mean()
    whole.add(values)
    for part in values.split([1, 7, 12]):
        parts.add(part)
    for mean in (whole, parts):
        assert mean.value == pytest.approx(values.double().mean().item())
        assert mean.error == pytest.approx(values.double().std().item() / math.sqrt(20))


def test_a_sequence_counts_as_often_as_it_has_positions():
    """Three positions of 1 and one of 5: their mean is 2, of the sequences 3."""
    mean = Mean()
    mean.add(torch.tensor([1.0, 5.0]), torch.tensor([3, 1]))
    assert mean.value == 2
    assert mean.error == pytest.approx(math.sqrt(2 / 1 * ((3 * 1) ** 2 + (1 * 3) ** 2)) / 4)
    whole, parts = Mean(), Mean()
    values, positions = torch.randn(9), torch.randint(0, 5, (9,))
    whole.add(values, positions)
    for value, count in zip(values.split(4), positions.split(4), strict=True):
        parts.add(value, count)
    assert parts.value == pytest.approx(whole.value)
    assert parts.error == pytest.approx(whole.error)


def test_one_sequence_has_no_error():
    single = Mean()
    single.add(torch.tensor([2.0]))
    assert single.value == 2
    assert math.isnan(single.error)
