"""What a step costs: counts by hand, a dry run against the real step, the heap's holes, the time, and `spd plan`."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import fields, replace

import pytest
import torch
from small_runs import ROOT, model_recipe, one_line, spd_here, toy_recipe
from torch import nn

from spdcli.costs.estimate import Estimate, Need, changes, estimate
from spdcli.costs.heap import Heap
from spdcli.costs.random_targets import random_subject, untrained_subject
from spdcli.costs.step_without_numbers import META, Dry, NoNoise
from spdcli.costs.tally import Tally
from spdcli.costs.timing import ENOUGH_STEPS, seconds_of_a_step
from spdcli.engine.fit import fit, start_fit
from spdcli.engine.forward import clean_pass
from spdcli.engine.masks import Noise
from spdcli.engine.step import backward_step
from spdcli.machine import describe, free_bytes, peak_bytes, state_bytes, training_bytes, used_bytes
from spdcli.recipe.reading import load_recipe
from spdcli.records import plain
from spdcli.runs.decomposition import parameter_counts, start_decomposition, untrained_decomposition
from spdcli.runs.settings import fit_settings, optimiser_settings

CPU = torch.device("cpu")
KINDS = {"scalar": (), "vector": (), "shared": (), "attention": ("importance.relative=query",)}


def test_operations_bytes_and_memory_by_hand():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    with Tally() as tally:
        product = a @ b  # 2 * 3 * 4 * 5
        assert (tally.flops, tally.bytes, tally.alive) == (120, 4 * (12 + 20 + 15), 60)
        doubled = product * 2
        assert tally.alive == 120
        del doubled
        assert (tally.alive, tally.peak) == (60, 120)
        product.view(5, 3).t()
        assert tally.operations == 2
        product.sum().backward()  # and the gradient of a: 2 * 3 * 5 * 4
    assert tally.flops == 240
    assert a.grad is not None


def test_a_broadcast_dimension_is_not_read_again():
    with Tally() as tally:
        torch.ones(1, 4).expand(100, 4).sum()
    assert tally.bytes == 4 * 4 + (4 * 4 + 4)


def test_what_is_picked_and_placed_counts_and_not_the_whole():
    source, rows, part = torch.ones(100, 4), torch.tensor([3, 5]), torch.ones(2, 4)
    with Tally() as tally:
        source.index_select(0, rows)  # two rows read and written, and their numbers
        assert tally.bytes == 2 * 32 + 16
        source.index_copy_(0, rows, part)  # numbers and two rows read, two rows written
        assert tally.bytes == 2 * (2 * 32 + 16)
        source.index_add_(0, rows, part)  # those two rows are read before
        assert tally.bytes == 2 * (2 * 32 + 16) + 3 * 32 + 16


def counted(recipe, subject, decomposition, noise, tally):
    names = decomposition.names
    settings = fit_settings(recipe)
    with tally:
        generator = torch.Generator().manual_seed(0)
        clean = clean_pass(subject.target, subject.batches(generator), names)
        backward_step(subject.target, decomposition, clean, settings.losses, 0.5, generator, noise, settings.plan_bytes)
    return tally


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", ["false", "true"])
def test_a_dry_step_costs_what_the_step_costs(kind, delta, tmp_path):
    """The same products and almost the same memory: the kernels for attention differ between the devices."""
    recipe = toy_recipe(f"importance.kind={kind}", f"slices.delta={delta}", *KINDS[kind], folder=tmp_path)
    subject = random_subject(recipe, CPU)
    names = list(subject.target.matrices)
    decomposition = start_decomposition(recipe, subject, names)
    real = counted(recipe, subject, decomposition, Noise(torch.Generator()), Tally())
    with Dry():
        shapes = untrained_subject(recipe, META)
        shape = untrained_decomposition(recipe, shapes, names, META)
    dry = counted(recipe, shapes, shape, NoNoise(), Dry())
    assert dry.flops == pytest.approx(real.flops, rel=0.1)
    assert dry.bytes == pytest.approx(real.bytes, rel=0.15)
    assert dry.peak == pytest.approx(real.peak, rel=0.2)
    trained = {name for name, p in decomposition.named_parameters() if p.grad is not None}
    assert {name for name, p in shape.named_parameters() if p.grad is not None} == trained
    assert all(p.is_meta for p in shape.parameters() if p.is_floating_point())


def test_a_language_models_shapes_are_read_without_its_weights(tiny_gpt2_dir, tmp_path):
    recipe = model_recipe(tiny_gpt2_dir, folder=tmp_path)
    with Dry():
        shapes = untrained_subject(recipe, META)
    assert all(p.is_meta for p in shapes.target.model.parameters())
    assert shapes.prompts.batch.tokens.device == CPU
    costs = estimate(load_recipe(tmp_path / "model.toml", [f"target.model={tiny_gpt2_dir}"]), CPU)
    slices, gates = costs.parameters.slices, costs.parameters.gates
    widths = [(32, 96), (32, 32), (32, 128), (128, 32)]  # block 1 alone, C 6, gate width 3
    assert slices == sum(6 * (d_in + d_out) for d_in, d_out in widths)
    assert gates == sum(6 * (3 * d_in + 3 + 3 + 1) for d_in, _ in widths)
    need = costs.bytes
    assert need.optimizer == 12 * (slices + gates)
    assert need.total == need.process + need.weights + need.optimizer + need.activations
    assert costs.fits
    assert 0 < costs.seconds_per_step < 5
    assert costs.seconds == 2 * costs.seconds_per_step
    assert (costs.toy_steps, costs.seconds_per_toy_step) == (0, 0)


CHEAPER = ("losses.layerwise_matrices=2", "losses.faithfulness_probes=3", "losses.subset=position")


@pytest.mark.parametrize("settings", [(), CHEAPER], ids=["exact", "cheaper"])
@pytest.mark.parametrize("kind", [*KINDS, "blocked"])
def test_a_step_asks_the_device_for_no_number(kind, settings, tmp_path):
    """On the meta device, which has none to give, a fresh batch's clean pass, losses and gradients go through."""
    blocked = ("importance.kind=attention", "importance.backend=blocked")
    chosen = blocked if kind == "blocked" else (f"importance.kind={kind}", *KINDS[kind])
    recipe = toy_recipe(*chosen, *settings, folder=tmp_path)
    subject = untrained_subject(recipe, META)
    names = list(subject.target.matrices)
    made = untrained_decomposition(recipe, subject, names, META)
    batch, wanted, generator = subject.batches(torch.Generator()), fit_settings(recipe), torch.Generator()
    assert batch.tokens.is_meta
    clean = clean_pass(subject.target, batch, names)
    with pytest.raises(RuntimeError, match="meta"):
        bool(batch.valid.all())
    backward_step(subject.target, made, clean, wanted.losses, 0.5, generator, NoNoise(), wanted.plan_bytes)
    assert all(p.grad is not None for p in made.slices.parameters())


def test_parameters_are_those_that_are_trained(tmp_path):
    recipe = toy_recipe(folder=tmp_path)
    subject = random_subject(recipe, CPU)
    names = list(subject.target.matrices)
    made = start_decomposition(recipe, subject, names)
    slices, gates = parameter_counts(recipe, subject, names)
    assert slices == sum(p.numel() for p in made.slices.parameters())
    assert slices + gates == sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert training_bytes(slices + gates, 4) == 4 * (slices + gates) + state_bytes(made)


def test_the_heap_has_holes_and_is_given_back():
    heap = Heap()
    blocks = [heap.take(3 << 20) for _ in range(8)]
    assert heap.growth >= 24 << 20
    for number in blocks[::2]:
        heap.give_back(number)
    heap.take(5 << 20)  # no hole of 3 MiB can hold it
    assert heap.growth >= 17 << 20
    heap.close()
    before = heap.growth
    heap.take(1 << 20)
    assert heap.growth == before


def test_untouched_blocks_cost_no_memory():
    before = used_bytes(CPU)
    heap = Heap()
    heap.take(1 << 30)
    assert used_bytes(CPU) - before < 1 << 26
    assert heap.growth >= 1 << 30
    heap.close()


def test_the_time_of_a_step_is_that_of_the_loop(tmp_path):
    """Side by side with the loop on a toy of its own; generous, since other programs share the machine."""
    path = tmp_path / "toy.toml"
    toy_recipe("decompose.batch=64", "slices.C=40", "decompose.steps=12", folder=tmp_path)
    loaded = load_recipe(path)
    recipe = loaded.recipe
    subject = random_subject(recipe, CPU)
    names = list(subject.target.matrices)
    decomposition = start_decomposition(recipe, subject, names)
    state = start_fit(decomposition, optimiser_settings(recipe.decompose), recipe.seed, CPU)
    seconds = []
    for _ in fit(subject.target, decomposition, subject.batches, state, fit_settings(recipe)):
        seconds.append(state.seconds)
    measured = statistics.median(after - before for before, after in itertools.pairwise(seconds))
    said = estimate(loaded, CPU).seconds_per_step
    assert measured / 2.5 < said < 2.5 * measured


def test_a_long_first_step_is_the_answer_and_pruning_is_left_out(tmp_path, monkeypatch):
    toy_recipe("decompose.prune_at=0.5", folder=tmp_path)
    loaded = load_recipe(tmp_path / "toy.toml")
    names = list(untrained_subject(loaded.recipe, META).target.matrices)
    made = []

    def counted_fit(*args, **kwargs):
        for record in fit(*args, **kwargs):
            made.append(record)
            yield record

    monkeypatch.setattr("spdcli.costs.timing.fit", counted_fit)
    settings = replace(fit_settings(loaded.recipe), steps=1, prune_step=1)
    monkeypatch.setattr("spdcli.engine.fit.frequent_slices", None)  # whoever prunes fails
    assert seconds_of_a_step(loaded.recipe, names, settings, CPU) > 0
    assert len(made) == 1 + ENOUGH_STEPS
    monkeypatch.setattr("spdcli.costs.timing.FIRST_ENOUGH", 0.0)
    made.clear()
    assert seconds_of_a_step(loaded.recipe, names, settings, CPU) > 0
    assert len(made) == 1


def test_broad_text_is_counted_and_its_steps_are_made(tiny_gpt2_dir, tmp_path):
    stream = (
        "slices.delta=true",
        "data.stream=generated",
        "data.stream_sequences=600",
        "data.stream_length=12",
    )
    targeted = ("losses.targeted=1", "decompose.stream_batch=600")
    model_recipe(tiny_gpt2_dir, folder=tmp_path)
    settings = [f"target.model={tiny_gpt2_dir}", *stream]
    alone = estimate(load_recipe(tmp_path / "model.toml", settings), CPU)
    beside = estimate(load_recipe(tmp_path / "model.toml", [*settings, *targeted]), CPU)
    assert beside.flops_per_step > 1.5 * alone.flops_per_step
    assert beside.bytes.activations > alone.bytes.activations + 2**20
    assert beside.seconds_per_step > 0


def test_what_each_of_several_processes_computes_and_sends(monkeypatch, capsys, tmp_path):
    toy_recipe(folder=tmp_path)  # 4 sequences; variants: two stochastic ones and six of one matrix each
    loaded = load_recipe(tmp_path / "toy.toml")
    alone, each = (estimate(loaded, CPU, seconds=False, processes=count) for count in (1, 3))
    assert each.flops_per_step == pytest.approx(
        alone.flops_per_step / 2, rel=0.02
    )  # of two sequences, as none has more
    trained = alone.parameters.slices + alone.parameters.gates
    assert plain(each.divided) == {
        "processes": 3,
        "by": "sequences",
        "sequences": 2,
        "rows": 2 * 8,
        "sent_per_step": round(4 / 3 * 4 * trained),
    }
    code, _, err = spd_here(monkeypatch, capsys)("plan", tmp_path / "toy.toml", "--nproc", 33)
    assert code == 2
    one_line(err, "33 processes, and a step has 32 rows to divide: 8 variants of the model on 4 sequences")


def test_what_to_change_when_it_does_not_fit(tiny_gpt2_dir, tmp_path):
    recipe = model_recipe(tiny_gpt2_dir, folder=tmp_path)
    state, steps = Need(1, 10, 100, 5), Need(1, 10, 100, 500)
    assert changes(recipe, state, 1000, True) == []
    assert changes(recipe, state, 10, True)[0] == "importance.basis=span"
    assert changes(recipe, state, 10, False) == ["a smaller slices.C", "fewer slices.matrices"]
    assert changes(recipe, steps, 10, False)[0] == "decompose.plan_memory=auto"
    spanned = model_recipe(tiny_gpt2_dir, "importance.basis=span", folder=tmp_path)
    assert "importance.basis=span" not in changes(spanned, state, 10, True)


def test_plan_says_that_it_fits_and_that_it_does_not(monkeypatch, capsys, tmp_path):
    spd = spd_here(monkeypatch, capsys)
    toy_recipe(folder=tmp_path)
    code, out, err = spd("plan", tmp_path / "toy.toml", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["schema"] == "spd.plan/1"
    assert found["toy_steps"] == 4
    assert 0 < found["seconds_per_toy_step"] < 1
    steps, training = 8 * found["seconds_per_step"], 4 * found["seconds_per_toy_step"]
    assert found["seconds"] == pytest.approx(steps + training)
    assert list(found) == ["schema", *(one.name for one in fields(Estimate) if one.name != "divided")]
    assert list(found["bytes"]) == ["process", "weights", "optimizer", "activations", "total"]
    assert "gpu" not in found["machine"]
    code, out, err = spd("plan", tmp_path / "toy.toml")
    assert code == 0
    assert out.splitlines()[-1].startswith("fits: ")
    monkeypatch.setattr("spdcli.costs.estimate.free_bytes", lambda device: -(2**40))
    code, out, err = spd("plan", tmp_path / "toy.toml", "-q")
    assert (code, out) == (1, "")
    one_line(err, "small does not fit: it needs ", "hint: --set ")
    code, out, err = spd("plan", tmp_path / "toy.toml", "--json")
    assert json.loads(out)["seconds"] is json.loads(out)["seconds_per_step"] is None


def test_the_machine_is_described():
    assert 2**26 < free_bytes(CPU) < 2**46
    assert 2**26 < used_bytes(CPU) <= peak_bytes(CPU) + 2**20
    machine = plain(describe(CPU))
    assert list(machine) == ["processor", "cores", "threads", "system", "python", "torch", "device"]
    assert machine["threads"] == torch.get_num_threads()
    linear = nn.Linear(3, 4)
    assert state_bytes(linear) == 3 * 4 * 16
    assert (ROOT / "recipes/gpt2-laptop.toml").exists()
