"""The tables of what one may choose: options and scripts take what they say, and one line adds a measure."""

from __future__ import annotations

import statistics
from typing import get_args

import pytest
import torch
from edited_models import answer_change

from spdcli.commands import ablate, locate, suppress
from spdcli.edits.choices import ANSWER_MEASURES, ORDERS, OTHERS, STATISTICS, TEXT_MEASURES, TOGETHER
from spdcli.edits.script import Expect, ScriptEdit, Select


def test_options_take_what_the_tables_say():
    assert get_args(suppress.Together) == tuple(TOGETHER)
    assert get_args(ablate.Others) == tuple(OTHERS)
    assert get_args(locate.Statistic) == tuple(STATISTICS)


@pytest.mark.parametrize(
    ("section", "key", "names", "rest"),
    [
        (ScriptEdit, "together", TOGETHER, {"name": "x"}),
        (Select, "by", ORDERS, {"prompt": 1, "token": "x"}),
        (Expect, "measure", [*ANSWER_MEASURES, *STATISTICS, *TEXT_MEASURES], {}),
    ],
)
def test_scripts_take_what_the_tables_say(section, key, names, rest):
    for name in names:
        assert getattr(section(**rest, **{key: name}), key) == name
    for other in ("", "no name", 1):
        with pytest.raises(ValueError, match=key):
            section(**rest, **{key: other})
    assert section.model_json_schema()["properties"][key]["enum"] == list(names)


@pytest.mark.parametrize("measure", ANSWER_MEASURES)
def test_a_measure_is_a_number_of_one_answer(measure):
    answer = answer_change(0.75, after=0.3, rank_after=2, kl=0.5)
    expected = {"probability": 0.3, "ratio": 0.75, "change": 0.25, "kl": 0.5, "rank": 2}
    assert isinstance(ANSWER_MEASURES[measure].of(answer), int | float)
    if measure in expected:
        assert ANSWER_MEASURES[measure].of(answer) == expected[measure]


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_is_over_the_last_dimension(name):
    changes = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = STATISTICS[name].of(changes)
    by_hand = {"median": statistics.median, "mean": statistics.fmean, "max": max}
    for row, value in zip(changes, values, strict=True):
        assert value.item() == pytest.approx(STATISTICS[name].of(row).item())
        if name in by_hand:
            assert value.item() == pytest.approx(by_hand[name](row.tolist()))
