"""Tables on a terminal of 80 columns: what a mark in them means stands below, where there is one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import pytest
import rich.console

from spdcli.commands.effect_tables import ACTIVE_MARK, effects_table
from spdcli.commands.inspect import UNIQUE_MARK, occurrence_table
from spdcli.edits.answer_changes import AnswerChange
from spdcli.measures.inspection import Occurrence, SliceActivity

KOBE = AnswerChange(
    group="prompt", prompt="Kobe Bryant plays professional basketball", token=" basketball",
    before=0.4751, after=0.1356, ratio=0.2854, rank_before=1, rank_after=3, kl=0.85,
)  # fmt: skip
SLICE = SliceActivity("layers.0.mlp.up_proj:2", 0.9, False, 1.5, [" ball"], [" Kobe"])


def printed(table: object) -> list[str]:
    """The lines of a table, 80 columns wide."""
    screen = rich.console.Console(file=io.StringIO(), width=80)
    screen.print(table)
    return screen.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("active", "marked"), [(["layers.0.mlp.up_proj:2"], True), ([], False), (None, False)])
def test_a_prompt_in_which_a_slice_is_active_is_marked(active: Sequence[str] | None, marked: bool) -> None:
    lines = printed(effects_table("Slices suppressed", [replace(KOBE, active=active)]))
    assert any("│ * │" in line for line in lines) is marked
    assert any(ACTIVE_MARK in line for line in lines) is marked
    assert any("' basketball'" in line and "0.1356" in line and "0.8500" in line for line in lines)


@pytest.mark.parametrize("unique", [True, False])
def test_a_unique_slice_is_marked(unique: bool) -> None:
    lines = printed(occurrence_table(Occurrence(1, "Kobe", 0, "Kobe", 1, [replace(SLICE, unique=unique)])))
    assert any("│ * │" in line for line in lines) is unique
    assert any(UNIQUE_MARK in line for line in lines) is unique
    assert any(SLICE.slice in line and "0.900" in line for line in lines)
