"""What the watchdog sees in a log, by records put together by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spdcli.engine.fit import Record
from spdcli.runs.watchdog import SIGNS, Watchdog, Watched

RUN = Watched(
    steps=1000,
    all_off={"recon": 4.0, "faithfulness": 0.5},
    slices=60,
    blocks={"a": 0, "b": 1, "c": 2},
    gate_bias=0.5,
    clipped=True,
)
GOOD = Record(
    step=500,
    losses={"recon": 0.1, "faithfulness": 1e-4},
    total=0.1,
    active={"a": 2.0, "b": 1.0, "c": 1.0},
    gradients={"slices": 0.1, "gates": 0.1},
    rate=0.01,
    p=0.5,
    seconds=1.0,
    always_on={"a": 1, "b": 0, "c": 0},
)
OFF = {"a": 0.0, "b": 0.0, "c": 0.0}


def record(step, **changes):
    return replace(GOOD, step=step, **changes)


def alarms(*records, run=RUN):
    """All that the watchdog tells of a log, as (kind, step)."""
    watchdog = Watchdog(run)
    return [(alarm.kind, alarm.step) for one in records for alarm in watchdog.see(one)]


def lines(*records, run=RUN):
    watchdog = Watchdog(run)
    return [str(alarm) for one in records for alarm in watchdog.see(one)]


def test_a_good_run_is_not_barked_at():
    assert alarms(record(1), *(record(step) for step in range(50, 1001, 50))) == []


@pytest.mark.parametrize(
    ("kind", "changes", "number"),
    [
        ("nothing_on", {"active": OFF}, 0),
        ("worse_than_none", {"losses": {"recon": 3.7}}, 3.7 / 4),
        ("unfaithful", {"losses": {"faithfulness": 0.6}}, 0.6 / 0.5),
        ("dead_matrices", {"active": {"a": 2.0, "b": 0, "c": 0}, "losses": {"recon": 1.0}}, 2 / 3),
        ("always_on", {"always_on": {"a": 2, "b": 1, "c": 1}}, 1),
        ("blind_gates", {"always_on": {"a": 2, "b": 1, "c": 1}, "losses": {"recon": 1.0}}, 1),
        ("crowded_last_block", {"active": {"a": 0.1, "b": 0.1, "c": 9.8}}, 0.98),
        ("still_gates", {"gradients": {"slices": 0.1, "gates": 0.0}}, 0),
    ],
)
def test_a_sign_is_told_once_it_has_stayed(kind, changes, number):
    watchdog = Watchdog(RUN)
    start = record(1, losses={"recon": 4.5, "faithfulness": 1.0})
    seen = [
        watchdog.see(one) for one in (start, record(550, **changes), record(600, **changes), record(650, **changes))
    ]
    kinds = [[alarm.kind for alarm in at] for at in seen]
    assert kinds[0] == kinds[1] == kinds[3] == []
    assert kind in kinds[2]
    alarm = next(alarm for alarm in seen[2] if alarm.kind == kind)
    assert (alarm.step, alarm.value) == (600, pytest.approx(number))
    assert str(alarm).startswith("step 600: ")
    assert alarm.collapse == SIGNS[kind].collapse
    assert watchdog.well != alarm.collapse
    assert kind not in [kind for kind, _ in alarms(start, record(550, **changes), record(600), record(650, **changes))]


@pytest.mark.parametrize(("rate", "told"), [(0.24, []), (0.26, [("rate_too_high", 1)])])
def test_a_rate_that_undoes_the_slices_is_told_in_the_first_step(rate, told):
    run = replace(RUN, size=0.05, slice_rate=0.2)
    assert alarms(record(1, rate=rate), record(50, rate=rate), run=run) == told
    if told:
        (line,) = lines(record(1, rate=rate), run=run)
        assert line == (
            "step 1: a step moves the numbers of U and V by about 0.052, and their root mean square is 0.05; "
            "lower decompose.learning_rate"
        )


def test_every_sign_has_a_case():
    cases = test_a_sign_is_told_once_it_has_stayed.pytestmark[0].args[1]
    assert {kind for kind, *_ in cases} | {"gradient_spike", "rate_too_high", "born_off", "pruned_too_much"} == set(
        SIGNS
    )


@pytest.mark.parametrize("kind", ["worse_than_none", "unfaithful", "always_on"])
def test_what_is_usual_at_the_beginning_is_no_sign(kind):
    bad = {"losses": {"recon": 5.0, "faithfulness": 1.0}, "always_on": {"a": 2, "b": 1, "c": 1}}
    assert alarms(record(1, **bad), record(50, **bad), record(99, **bad)) == []
    assert kind in dict(alarms(record(1), record(1000, **bad)))  # in the last record a sign need not stay


def test_a_run_that_began_well_may_lose_less():
    lost = {"losses": {"recon": 2.5}}
    assert alarms(record(1, losses={"recon": 3.0}), record(500, **lost), record(550, **lost)) == []
    assert alarms(record(1, losses={"recon": 0.01}), record(500, **lost), record(550, **lost)) == [
        ("worse_than_none", 550)
    ]


def test_gates_that_begin_off_are_told_in_the_first_step():
    run = replace(RUN, gate_bias=-5)
    off = record(1, active=OFF)
    assert lines(off, run=run) == ["step 1: no slice is on anywhere, of 60; raise importance.gate_bias, which is -5"]


@pytest.mark.parametrize(("bias", "on", "told"), [(-2, 1.0, True), (0.5, 1.0, False), (-2, 4.0, False)])
def test_gates_that_begin_almost_off_are_told_in_the_first_step(bias, on, told):
    run = replace(RUN, gate_bias=bias)
    few = {"active": {"a": on, "b": 0.0, "c": 0.0}}
    assert alarms(record(1, **few), record(50, **few), run=run) == ([("born_off", 1)] if told else [])


def test_the_setting_that_switched_all_off_is_named():
    start = record(1, active={"a": 20, "b": 20, "c": 20})
    off = [record(500, active=OFF), record(550, active=OFF)]
    assert "lower losses.minimality" in lines(start, *off)[0]
    between = [record(step) for step in range(2, 202)]  # more than are remembered
    assert "lower losses.minimality" in lines(start, *between, *off)[0]
    assert "lower decompose.prune_below, by which step 500" in lines(start, *off, run=replace(RUN, prune_step=500))[0]
    assert "lower losses.minimality" in lines(start, *off, run=replace(RUN, prune_step=900))[0]


def test_pruning_that_takes_what_is_needed_is_told():
    run = replace(RUN, prune_step=500)
    few = {"active": {"a": 1.0, "b": 0.5, "c": 0.0}}
    log = [record(1), record(500), record(550, **few, losses={"recon": 1.0}), record(600, **few, losses={"recon": 1.0})]
    assert lines(*log, run=run) == [
        "step 600: pruning at step 500 left 1.5 of 4 active slices, and recon went from 0.1 to 1; "
        "lower decompose.prune_below"
    ]
    assert alarms(record(1), record(500), record(550, **few), record(600, **few), run=run) == []
    assert "pruned_too_much" not in dict(alarms(*log, run=replace(RUN, prune_step=None)))


def test_a_spike_matters_where_nothing_clips_it():
    spike = {"gradients": {"slices": 0.1, "gates": 200.0}}
    log = [record(step) for step in (1, 50, 100)]
    assert alarms(*log, record(150, **spike)) == []
    assert alarms(*log, record(150, **spike), run=replace(RUN, clipped=False)) == [("gradient_spike", 150)]
    assert alarms(*log[:2], record(150, **spike), run=replace(RUN, clipped=False)) == []


def test_the_judged_loss_is_the_one_whose_masks_matter_most():
    off = {"recon_layerwise": 1.0, "stochastic_recon": 4.0}
    losses = {"recon_layerwise": 2.0, "stochastic_recon": 1.0}
    run = replace(RUN, all_off=off)
    assert alarms(record(500, losses=losses), record(550, losses=losses), run=run) == []
    losses["stochastic_recon"] = 4.1
    assert alarms(record(500, losses=losses), record(550, losses=losses), run=run) == [("worse_than_none", 550)]
