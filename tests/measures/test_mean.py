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
    single = Mean()
    single.add(torch.tensor([2.0]))
    assert single.value == 2
    assert math.isnan(single.error)
