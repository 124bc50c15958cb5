"""The training loop: falling losses, seeds, clipping, pruning, resuming, refusing what is not finite."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from twins import decompose, toy_subject

from spdcli.engine import fit as fit_module
from spdcli.engine.direct_losses import exact_faithfulness
from spdcli.engine.finite import FiniteWatch
from spdcli.engine.fit import FitSettings, fit, frequent_slices, start_fit, warm_up_faithfulness
from spdcli.engine.forward import clean_pass
from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.optimise import OptimiserSettings
from spdcli.engine.target import Batch
from spdcli.errors import SpdError

EVERY_LOSS = {
    "recon": 0.5,
    "stochastic_recon": 1.0,
    "stochastic_recon_layerwise": 1.0,
    "stochastic_recon_partial": 1.0,
    "minimality": 1e-3,
    "faithfulness": 10.0,
}
CPU = torch.device("cpu")


class Run:
    """A small problem: the toy in float32, four fixed sequences unless `fresh`."""

    def __init__(
        self, seed=0, steps=5, rate=1e-2, fresh=False, coefficients=EVERY_LOSS, schedule="constant", **settings
    ):
        self.subject = toy_subject(sequences=4)
        self.target = self.subject.target
        self.target.model.float()
        self.target.unembedding = self.target.model.unembed.weight
        self.fresh = fresh
        self.decomposition = decompose(self.target, slices=8, seed=seed)
        self.settings = FitSettings(steps=steps, log_every=1, losses=LossSettings(coefficients), **settings)
        optimiser = OptimiserSettings("adam", rate, 0.0, schedule, 0, steps)
        self.state = start_fit(self.decomposition, optimiser, seed, CPU)

    def batches(self, generator, number=0):
        if not self.fresh:
            return self.subject.batch
        tokens = torch.randint(11, (4, 7), generator=generator)
        return Batch(tokens, tokens >= 0, tokens >= 0)

    def steps(self):
        return fit(self.target, self.decomposition, self.batches, self.state, self.settings)

    def records(self):
        return [record for record in self.steps() if record is not None]

    def parameters(self):
        return {name: p.detach().clone() for name, p in self.decomposition.named_parameters() if p.requires_grad}


def test_every_loss_falls():
    records = Run(steps=150, coefficients=EVERY_LOSS | {"minimality": 0.0}).records()
    assert len(records) == 150
    for name in records[0].losses:  # over ten steps each, as subsets and masks are drawn anew
        first, last = (sum(record.losses[name] for record in some) for some in (records[:10], records[-10:]))
        assert last < 0.1 * first, name


def test_minimality_makes_slices_inactive():
    records = Run(steps=100, coefficients={"minimality": 1.0}).records()
    assert sum(records[-1].active.values()) < 0.2 * sum(records[0].active.values())


def test_a_record_adds_up():
    record = Run().records()[0]
    assert record.step == 1
    assert set(record.losses) == set(EVERY_LOSS)
    assert record.total == pytest.approx(sum(EVERY_LOSS[name] * loss for name, loss in record.losses.items()))
    assert set(record.active) == {"Q0", "K0", "V0", "Q1", "K1", "V1"}
    assert all(0 <= count <= 8 for count in record.active.values())
    assert record.rate == 1e-2


def comparable(records):
    return [replace(record, seconds=0.0) for record in records]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_seed_decides_everything(fresh):
    first, second, other = (comparable(Run(seed=seed, fresh=fresh).records()) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_stopping_between_steps_changes_nothing():
    whole = comparable(Run(steps=6, fresh=True, schedule="cosine").records())
    run = Run(steps=6, fresh=True, schedule="cosine")
    steps = run.steps()
    begun = [next(steps) for _ in range(3)]
    steps.close()
    assert comparable(begun + run.records()) == whole


def test_records_come_when_they_are_due():
    run = Run(steps=7)
    run.settings = replace(run.settings, log_every=3)
    given = list(run.steps())
    assert len(given) == 7
    assert [record.step for record in given if record is not None] == [1, 3, 6, 7]


def norms(run):
    groups = zip(("slices", "gates"), run.state.optimiser.param_groups, strict=True)
    return {
        n: torch.cat([p.grad.flatten() for p in g["params"] if p.grad is not None]).norm().item() for n, g in groups
    }


@pytest.mark.parametrize(
    ("clip", "clipped"),
    [
        ({}, set()),
        ({"clip_slices": 1e-3}, {"slices"}),
        ({"clip_gates": 1e-4}, {"gates"}),
        ({"clip_slices": 1e-3, "clip_gates": 1e-4}, {"slices", "gates"}),
        ({"clip_slices": 1e6, "clip_gates": 1e6}, set()),
    ],
)
def test_slices_and_gates_are_clipped_apart(clip, clipped):
    run = Run(**clip)
    record = next(run.steps())
    limits = {"slices": 1e-3, "gates": 1e-4}
    for name, norm in norms(run).items():
        assert record.gradients[name] > 10 * limits[name]  # the record has the norm from before
        assert norm == pytest.approx(limits[name] if name in clipped else record.gradients[name], rel=1e-2)


def test_p_falls_over_the_run_and_is_recorded():
    run = Run(steps=5)
    assert [record.p for record in run.records()] == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    run = Run(steps=5)
    run.settings = replace(run.settings, losses=replace(run.settings.losses, anneal_p=False, p_start=0.4))
    assert [record.p for record in run.records()] == [0.4] * 5


def test_minimality_and_frequency_count_less_by_one_factor_a_step():
    coefficients = {"faithfulness": 1.0, "minimality": 0.4, "frequency": 0.2}
    run = Run(steps=3, coefficients=coefficients)
    run.settings = replace(run.settings, losses=replace(run.settings.losses, penalty_final=0.25))
    for record, share in zip(run.records(), (1, 0.5, 0.25), strict=True):
        losses = record.losses
        penalties = 0.4 * losses["minimality"] + 0.2 * losses["frequency"]
        assert record.total == pytest.approx(losses["faithfulness"] + share * penalties)


def test_a_step_is_that_of_the_coefficient_that_minimality_has_there():
    falling, changed = (Run(steps=2, coefficients={"faithfulness": 1.0, "minimality": 0.4}) for _ in range(2))
    falling.settings = replace(falling.settings, losses=replace(falling.settings.losses, penalty_final=0.25))
    falling.records()
    next(changed.steps())
    changed.settings = replace(changed.settings, losses=LossSettings({"faithfulness": 1.0, "minimality": 0.1}))
    changed.records()
    assert all(torch.equal(p, changed.parameters()[name]) for name, p in falling.parameters().items())


def test_gamma_falls_over_the_run_and_is_recorded_in_place_of_p():
    run = Run(steps=5)
    run.settings = replace(run.settings, losses=replace(run.settings.losses, penalty="smooth_l0", gamma_final=0.2))
    records = list(run.records())
    assert [record.gamma for record in records] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert [record.p for record in records] == [None] * 5


def test_the_rate_follows_its_schedule():
    assert [record.rate for record in Run(schedule="linear").records()] == pytest.approx(
        [0.01, 0.008, 0.006, 0.004, 0.002]
    )


@pytest.mark.parametrize(("slice_rate", "moved"), [(0.0, 0.0), (0.1, 1e-3), (1.0, 1e-2)])
def test_slices_have_a_rate_of_their_own(slice_rate, moved):
    run = Run(steps=1)
    run.state = start_fit(run.decomposition, run.state.schedule, 0, CPU, slice_rate)
    before = run.parameters()
    run.records()
    # Adam's first step is the rate, wherever there is a gradient to speak of.
    steps = {name: (p - before[name]).abs().max().item() for name, p in run.parameters().items()}
    for name, step in steps.items():
        assert step == pytest.approx(moved if name.startswith("slices") else 1e-2, rel=1e-2), name


def test_a_rate_of_nothing_changes_nothing():
    run = Run(rate=0.0)
    before = run.parameters()
    run.records()
    assert all(torch.equal(p, before[name]) for name, p in run.parameters().items())


@pytest.mark.parametrize(
    ("fresh", "prune_step", "passes"),
    [(False, None, 1), (True, None, 5), (False, 2, 2), (True, 2, 5 + 3)],  # to prune: one fixed batch, three fresh ones
)
def test_the_target_runs_once_a_batch(fresh, prune_step, passes, monkeypatch):
    monkeypatch.setattr(fit_module, "PRUNE_BATCHES", 3)
    run = Run(fresh=fresh, prune_step=prune_step)
    inner, calls = run.target.run, []
    run.target.run = lambda *args: (calls.append(1), inner(*args))[1]
    run.records()
    assert len(calls) == passes


def spoil(run, where, value):
    """Put `value` into one parameter."""
    parameter = dict(run.decomposition.named_parameters())[where]
    with torch.no_grad():
        parameter.view(-1)[0] = value


@pytest.mark.parametrize(
    ("where", "value", "losses", "term"),
    [
        ("slices.V0.V", float("nan"), {"recon": 1.0}, "recon is nan"),
        ("slices.Q0.V", float("inf"), {"faithfulness": 1.0, "recon": 0.0}, "faithfulness is inf"),
        ("slices.Q0.V", 1e25, {"faithfulness": 1.0, "minimality": 1.0}, "faithfulness is inf"),
        ("importances.gates.V1.b2", float("nan"), {"minimality": 1.0}, "minimality is nan"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(where, value, losses, term):
    run = Run(coefficients=losses)
    steps = run.steps()
    next(steps)
    next(steps)
    spoil(run, where, value)
    before = run.parameters()
    with pytest.raises(SpdError, match=rf"step 3: .*{term}") as error:
        next(steps)
    assert error.value.hint
    for name, parameter in run.parameters().items():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)
    assert run.state.step == 2


def test_what_is_noticed_late_has_changed_nothing(monkeypatch):
    """As on a GPU, which is asked at the next record alone: from the broken step on no parameter moves."""
    run = Run(steps=9)
    steps = run.steps()
    next(steps)
    spoil(run, "slices.V0.V", float("nan"))
    before = run.parameters()
    with monkeypatch.context() as late:
        late.setattr(FiniteWatch, "check", lambda watch, names: None)
        for _ in range(3):
            next(steps)
    for name, parameter in run.parameters().items():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(SpdError, match=r"step 2: loss recon is nan"):
        next(steps)


def test_a_rate_that_is_too_high_stops_with_finite_parameters():
    run = Run(rate=1e18, steps=50)
    with pytest.raises(SpdError, match=r"step \d+: "):
        run.records()
    assert all(p.isfinite().all() for p in run.parameters().values())


def test_a_loss_that_overflows_under_a_finite_gradient_stops_too():
    run = Run(coefficients={"faithfulness": 1.0})
    slices = run.decomposition.of("Q0")
    with torch.no_grad():  # one error of 2e19: its square is past float32, and its slope is not
        slices.U.zero_()
        slices.V.zero_()
        slices.U[0, 0], slices.V[0, 0] = 2e19, 1.0
        slices.V[0, 1:] = 0
    with pytest.raises(SpdError, match="step 1: loss faithfulness is inf"):
        next(run.steps())


def active_share(run, batches):
    """In what share of the sequences each slice is active somewhere, counted one by one."""
    share = {name: torch.zeros(8) for name in run.decomposition.names}
    for batch in batches:
        g, _ = run.decomposition.importance(clean_pass(run.target, batch, run.decomposition.names).inputs, batch.valid)
        for name, b, c in itertools.product(share, range(4), range(8)):
            share[name][c] += any(value > 0 for value in g[name][b, :, c].tolist()) / (4 * len(batches))
    return share


@pytest.mark.parametrize("fresh", [True, False])
def test_rare_slices_are_counted_on_sequences(fresh, monkeypatch):
    monkeypatch.setattr(fit_module, "PRUNE_BATCHES", 5)
    run = Run(fresh=fresh)
    with torch.no_grad():  # lower gates, of which many are open on some sequences only
        for gate in run.decomposition.importances.gates.values():
            gate.b2 -= 1.2
    generator = torch.Generator().manual_seed(1)
    kept = frequent_slices(run.target, run.decomposition, run.batches, generator.clone_state(), 0.45)
    share = active_share(run, [run.batches(generator) for _ in range(5 if fresh else 1)])
    assert {name: keep.tolist() for name, keep in kept.items()} == {n: (s >= 0.45).tolist() for n, s in share.items()}
    for part in (lambda s: s == 0, lambda s: (s > 0) & (s < 0.45), lambda s: s > 0.45):
        assert any(part(s).any() for s in share.values())


def test_a_run_prunes_once_and_goes_on(monkeypatch):
    monkeypatch.setattr(fit_module, "PRUNE_BATCHES", 2)
    run = Run(steps=6, fresh=True, prune_step=3, prune_below=0.99)
    alive = []
    for record in run.steps():
        alive.append({n: p.clone() for n, p in run.decomposition.named_parameters() if "alive" in n})
        if record.step > 3:  # what a record counts as active is still alive
            assert all(record.active[n] <= int(alive[-1][f"importances.alive.{n}"].sum()) for n in record.active)
    counts = [sum(int(mask.sum()) for mask in masks.values()) for masks in alive]
    assert counts[:2] == [48, 48]
    assert 0 < counts[2] < 48
    assert counts[2:] == [counts[2]] * 4


def test_warm_up_lowers_faithfulness_alone():
    run = Run()
    gates = {name: p for name, p in run.parameters().items() if name.startswith("importances")}
    before = exact_faithfulness(run.target, run.decomposition).item()
    reached = warm_up_faithfulness(run.target, run.decomposition, steps=200, rate=1e-2)
    assert reached < 0.05 * before
    assert reached == pytest.approx(exact_faithfulness(run.target, run.decomposition).item())
    assert all(torch.equal(p, run.parameters()[name]) for name, p in gates.items())
    assert all(p.grad is None for p in run.decomposition.parameters())


def test_no_warm_up_changes_nothing():
    run = Run()
    before = run.parameters()
    warm_up_faithfulness(run.target, run.decomposition, steps=0)
    assert all(torch.equal(p, before[name]) for name, p in run.parameters().items())
