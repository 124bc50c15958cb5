"""`spd eval` of a toy against the same numbers worked out one position, one matrix, one sequence at a time."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from slow_evaluation import CPU, FLOAT32, LOSSES, NOISE, TOY, kl, masked, stand_ins, steady_noise, unsettle  # noqa: F401
from slow_toy import slow_toy
from small_runs import loud_toy, toy_recipe

from spdcli.engine import tables
from spdcli.measures import circuit, evaluation_data, evaluation_totals
from spdcli.measures.evaluation import evaluate, evaluate_without_circuit
from spdcli.measures.evaluation_data import EVALUATION_SEED
from spdcli.records import ABSENT, plain
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import toy_subject
from spdcli.targets.sequences import InductionSequences


def slow_evaluation(subject, decomposition, batches, threshold):
    toy, names = subject.toy, decomposition.names
    weights = {name: matrix.weight for name, matrix in subject.target.matrices.items()}
    losses = {loss: [] for loss in (*LOSSES, "hidden_recon")}
    active = {name: {kind: [] for kind in ("s1", "m", "s2", "random")} for name in names}
    seen = {name: set() for name in names}
    attention = {layer: [] for layer in range(len(toy.blocks))}
    split = {(layer, kind): [] for layer in attention for kind in ("matters", "rest", "last")}
    right = {"target": 0, "masked": 0}
    by_matrix = {name: [] for name in names}
    for batch in batches:
        for row, tokens in enumerate(batch.tokens):
            log_p, rows, reads = slow_toy(toy, tokens, lambda name, t: weights[name])
            g, _ = decomposition.importance({name: reads[name][None] for name in names})

            def run(chosen, source, tokens=tokens, g=g):
                return slow_toy(toy, tokens, stand_ins(weights, decomposition, g, chosen, source))

            for loss in LOSSES:
                source, scope = tables.LOSSES[loss].source, tables.LOSSES[loss].scope
                sets = [[name] for name in names] if scope == "each" else [names]
                values = [kl(log_p, run(chosen, source)[0]) for chosen in sets]
                losses[loss].append(statistics.mean(values))
                if loss == "recon_layerwise":
                    for name, value in zip(names, values, strict=True):
                        by_matrix[name].append(value)
            log_q, masked_rows, masked_reads = run(names, "importance")
            instead = stand_ins(weights, decomposition, g, names, "importance")
            errors = []
            for name in names:
                for t, (x, y) in enumerate(zip(masked_reads[name], reads[name] @ weights[name], strict=True)):
                    errors.append(((x @ instead(name, t) - y).norm() / y.norm()).item() ** 2)
            losses["hidden_recon"].append(statistics.mean(errors))
            for layer, divergences in attention.items():
                divergences.append(statistics.mean(kl(rows[at], masked_rows[at]) for at in rows if at[0] == layer))
                s2 = len(tokens) - 1
                m = int((tokens[:s2] == toy.shape.vocabulary).nonzero()) + 1
                query = m if layer == 0 else s2
                split[layer, "last"].append(
                    statistics.mean(kl(rows[at], masked_rows[at]) for at in rows if at[0] == layer and at[2] == s2)
                )
                for kind in ("matters", "rest"):
                    chosen = [at for at in rows if at[0] == layer and (at[2] == query) == (kind == "matters")]
                    split[layer, kind].append(statistics.mean(kl(rows[at], masked_rows[at]) for at in chosen))
            for model, guess in (("target", log_p), ("masked", log_q)):
                right[model] += int(guess.argmax() == batch.answers[row])
            for name in names:
                for t in range(len(tokens)):
                    on = [c for c, value in enumerate(g[name][0, t]) if value > threshold]
                    kind = next(kind for kind, mask in batch.classes.items() if mask[row, t])
                    active[name][kind].append(len(on))
                    seen[name] |= set(on)
    errors = [(weights[n] - decomposition.of(n).U @ decomposition.of(n).V).square().sum().item() for n in names]
    count = len(losses["recon"])
    return {
        "sequences": count,
        "active": {name: {kind: statistics.mean(n) for kind, n in kinds.items()} for name, kinds in active.items()},
        "unique": {name: len(slices) for name, slices in seen.items()},
        "total_active": sum(len(slices) for slices in seen.values()),
        "total_slices": 3 * len(names),
        "metrics": {
            "faithfulness": sum(errors) / sum(weights[name].numel() for name in names),
            "relative_faithfulness": statistics.mean(
                error / weights[name].square().sum().item() for error, name in zip(errors, names, strict=True)
            ),
        }
        | {loss: statistics.mean(values) for loss, values in losses.items()},
        "standard_error": {"faithfulness": 0.0, "relative_faithfulness": 0.0}
        | {loss: statistics.stdev(values) / math.sqrt(count) for loss, values in losses.items()},
        "recon_layerwise_by_matrix": {name: statistics.mean(values) for name, values in by_matrix.items()},
        "attention_kl": [statistics.mean(values) for values in attention.values()],
        "attention_kl_split": [
            {"layer": layer} | {kind: statistics.mean(split[layer, kind]) for kind in ("matters", "rest", "last")}
            for layer in attention
        ],
        "accuracy": {model: number / count for model, number in right.items()},
    }


def compare(ours, slow):
    assert ours.keys() >= slow.keys()
    for key, value in slow.items():
        if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            compare(ours[key], value)
        elif key == "attention_kl_split":
            for mine, theirs in zip(ours[key], value, strict=True):
                compare(mine, theirs)
        else:
            assert ours[key] == pytest.approx(value, **FLOAT32), key


ALL = ["Q0", "K0", "V0", "Q1", "K1", "V1"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "names", "threshold", "plan_bytes"),
    [
        ([], ALL, 0.0, 2**30),
        (["slices.delta=true"], ALL, 0.2, 2**30),
        (["importance.kind=scalar"], ["K1", "V1"], 0.0, 2**30),  # the first block is left alone
        (["slices.delta=true"], ["V0", "Q1"], 0.0, 1),  # every sequence of every variant on its own
    ],
)
def test_the_toys_numbers_are_those_of_a_slow_evaluation(tmp_path, monkeypatch, settings, names, threshold, plan_bytes):
    monkeypatch.setattr(evaluation_data, "SEQUENCES_AT_ONCE", 3)
    monkeypatch.setattr(evaluation_totals, "PLAN_BYTES", plan_bytes)
    recipe = toy_recipe(*TOY, *settings, folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe, seed=1))
    decomposition = unsettle(start_decomposition(recipe, subject, names))
    generator = torch.Generator().manual_seed(EVALUATION_SEED + 9)
    batches = [InductionSequences(6, 4).draw(count, generator) for count in (3, 3, 1)]
    slow = slow_evaluation(subject, decomposition, batches, threshold)
    compare(plain(evaluate(subject, decomposition, 7, threshold, seed=9)), slow)
    assert 0 < slow["total_active"] < slow["total_slices"]  # the comparison has something to compare
    assert slow["metrics"]["recon"] > 0.01
    assert (slow["attention_kl"][0] == 0) == ("Q0" not in names)


@torch.no_grad()
def test_perfect_slices_with_open_gates_change_nothing(tmp_path):
    recipe = toy_recipe("slices.C=8", "importance.gate_bias=2.0", folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe))
    decomposition = start_decomposition(recipe, subject, ALL)
    for gate in decomposition.importances.gates.values():
        gate.w2.zero_()
    evaluation = evaluate(subject, decomposition, 50, 0.0, seed=0)
    assert all(0 <= value < 1e-6 for value in evaluation.metrics.values())
    assert evaluation.active["V1"] == {"s1": 8, "m": 8, "s2": 8, "random": 8}
    assert evaluation.accuracy.masked == evaluation.accuracy.target
    assert evaluation.attention_kl == pytest.approx([0, 0], abs=1e-6)


def test_the_seed_draws_the_sequences(tmp_path):
    recipe = toy_recipe(*TOY, folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe))
    decomposition = unsettle(start_decomposition(recipe, subject, ["V1"]))
    one, again, other = (evaluate(subject, decomposition, 20, 0.0, seed).metrics for seed in (1, 1, 2))
    assert one == again
    assert one["recon"] != other["recon"]
    assert one["faithfulness"] == other["faithfulness"]


@torch.no_grad()
def test_only_the_papers_kind_of_toy_is_explained_and_it_is_explained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(circuit, "SEQUENCES", 20)
    recipe = toy_recipe(folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe))
    decomposition = unsettle(start_decomposition(recipe, subject, ALL))
    whole = evaluate(subject, decomposition, 10, 0.1, seed=3)
    assert whole.circuit == circuit.circuit_of(subject, decomposition, 0.1, seed=3)
    assert plain(whole)["circuit"]["sequences"] == 20
    without = evaluate_without_circuit(subject, decomposition, 10, 0.1, seed=3)
    assert without == replace(whole, circuit=ABSENT)
    assert "circuit" not in plain(without)
    other = toy_recipe("target.heads=2", folder=tmp_path)
    two_heads = toy_subject(other, loud_toy(other))
    assert evaluate(two_heads, start_decomposition(other, two_heads, ["V1"]), 10, 0.0, seed=3).circuit is ABSENT
