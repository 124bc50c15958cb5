"""Learning rates by hand."""

from __future__ import annotations

import pytest
import torch

from spdcli.engine.optimise import OptimiserSettings, make_optimiser, rate_factor, set_rate, warmup_steps


def settings(schedule="constant", warmup=0, steps=10, optimizer="adam", weight_decay=0.0):
    return OptimiserSettings(optimizer, 0.5, weight_decay, schedule, warmup, steps)


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("constant", 0, {0: 1, 5: 1, 9: 1}),
        ("constant", 4, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 9: 1}),
        ("linear", 0, {0: 1, 5: 0.5, 9: 0.1, 10: 0}),
        ("linear", 2, {0: 0.5, 1: 1, 2: 1, 6: 0.5, 10: 0}),
        ("cosine", 0, {0: 1, 5: 0.5, 10: 0}),
        ("cosine", 4, {0: 0.25, 3: 1, 4: 1, 6: 0.75, 7: 0.5, 8: 0.25, 10: 0}),  # (1 + cos(pi / 3)) / 2 = 0.75
        ("cosine", 10, {0: 0.1, 9: 1}),
    ],
)
def test_schedules_by_hand(schedule, warmup, factors):
    for step, factor in factors.items():
        assert rate_factor(step, settings(schedule, warmup)) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_rate_stays_at_zero_after_the_last_step(schedule):
    assert rate_factor(25, settings(schedule)) == 0


@pytest.mark.parametrize(
    ("warmup", "expected"), [(0, 0), (0.01, 200), (0.99999, 20000), (1, 1), (1000, 1000), (1000.4, 1000)]
)
def test_a_warmup_below_one_is_a_fraction(warmup, expected):
    assert warmup_steps(warmup, 20000) == expected


def test_the_rate_is_set_in_every_group():
    groups = [{"params": [torch.nn.Parameter(torch.ones(n))]} for n in (1, 2)]
    groups[1]["factor"] = 0.1
    optimiser = make_optimiser(groups, settings("linear"))
    for _ in range(2):  # a factor does not pile up
        assert set_rate(optimiser, settings("linear"), 5) == 0.25
        assert [group["lr"] for group in optimiser.param_groups] == [0.25, 0.025]


@pytest.mark.parametrize(
    ("optimizer", "weight_decay", "expected"),
    [
        ("adam", 0.0, 1.5),  # Adam's first step is the rate, 0.5, against the gradient's sign
        ("adam", 100.0, 1.5),  # its decay is part of the gradient, and only the sign counts
        ("adamw", 0.0, 1.5),
        ("adamw", 0.5, 1.0),  # decoupled: 2 (1 - 0.5 * 0.5) first
    ],
)
def test_first_steps_by_hand(optimizer, weight_decay, expected):
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimiser = make_optimiser([{"params": [parameter]}], settings(optimizer=optimizer, weight_decay=weight_decay))
    parameter.grad = torch.tensor([3.0])
    optimiser.step()
    assert parameter.item() == pytest.approx(expected, rel=1e-6)  # Adam's epsilon, and float32
