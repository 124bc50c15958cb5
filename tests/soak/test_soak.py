"""A few seconds of the soak, on every change; `make soak SECONDS=3600` is the long one."""

from __future__ import annotations

import pytest

from soak.soak import attempt, soak

TRIES = {"documents": 400, "tensors": 100, "models": 20}  # processes that are killed start too slowly for here


@pytest.mark.parametrize("kind", TRIES)
def test_damage_is_one_line_or_a_right_answer(kind, tmp_path):
    (tally,) = soak(tmp_path, {kind: 1.0}, tries=TRIES)
    assert tally.tried == TRIES[kind]
    assert tally.failures == {}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError("a bug"), "a bug"),
        (AssertionError("weights"), "damage accepted: weights"),
        (SystemExit(3), "past every handler: SystemExit: 3"),
        (ValueError("two\nlines"), "two"),
    ],
)
def test_what_a_soak_finds_is_told(error, said):
    def trial(chance):
        raise error

    assert said in attempt(trial, 0)
