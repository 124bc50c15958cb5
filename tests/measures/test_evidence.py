"""Corners and searches of `spd eval`: against slow evaluations, and on decompositions right or broken by hand."""

from __future__ import annotations

import statistics

import pytest
import torch
from right_decompositions import ALL, hide_a_pair, right_run
from slow_evaluation import CPU, FLOAT32, TOY, kl, unsettle
from slow_toy import slow_toy
from small_runs import loud_toy, model_recipe, toy_recipe

from spdcli.engine.tables import GRADES, LOSSES
from spdcli.measures.evaluation import evaluate_without_circuit
from spdcli.measures.evaluation_data import EVALUATION_SEED
from spdcli.measures.evidence_choices import CORNERS, MASKS, NO_SEARCH, MaskSearch
from spdcli.records import plain
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import language_subject, toy_subject
from spdcli.targets.sequences import InductionSequences

QUICK = MaskSearch("quick", 2)


def evaluated(subject, decomposition, adversary=NO_SEARCH, sequences=20):
    return evaluate_without_circuit(subject, decomposition, sequences, 0.1, 9, adversary)


@torch.no_grad()
@pytest.mark.parametrize("delta", ["true", "false"])  # W - U V is the delta, whether it counts as a component or not
def test_corners_active_slices_and_delta_are_those_of_a_slow_evaluation(tmp_path, delta):
    recipe = toy_recipe(*TOY, f"slices.delta={delta}", folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe, seed=1))
    decomposition = unsettle(start_decomposition(recipe, subject, ALL))
    ours = evaluated(subject, decomposition, sequences=4)
    batch = InductionSequences(6, 4).draw(4, torch.Generator().manual_seed(EVALUATION_SEED + 9))
    weights = {name: matrix.weight for name, matrix in subject.target.matrices.items()}
    rest = {name: weights[name] - decomposition.of(name).U @ decomposition.of(name).V for name in ALL}
    kls, right = {name: [] for name in CORNERS}, {name: [] for name in CORNERS}
    active, written = [], {name: ([], []) for name in ALL}
    for row, tokens in enumerate(batch.tokens):
        log_p, _, reads = slow_toy(subject.toy, tokens, lambda name, t: weights[name])
        g, _ = decomposition.importance({name: reads[name][None] for name in ALL})
        active += [sum(int((g[name][0, t] > 0.1).sum()) for name in ALL) for t in range(6)]
        for name in ALL:
            written[name][0].append((reads[name] @ rest[name]).square().sum())
            written[name][1].append((reads[name] @ weights[name]).square().sum())
        for name, corner in CORNERS.items():

            def weight_at(matrix, t, corner=corner, g=g):
                own, mask = decomposition.of(matrix), g[matrix][0, t]
                mask = torch.ones_like(mask) if corner.on else mask
                return own.U @ torch.diag(mask) @ own.V + corner.delta * rest[matrix]

            log_q = slow_toy(subject.toy, tokens, weight_at)[0]
            kls[name].append(kl(log_p, log_q))
            right[name].append(int(log_q.argmax() == batch.answers[row]))
    for name in CORNERS:
        assert ours.evidence.kl[name] == pytest.approx(statistics.mean(kls[name]), **FLOAT32), name
        assert ours.evidence.accuracy[name] == statistics.mean(right[name]), name
        assert ours.evidence.standard_error[name] == pytest.approx(statistics.stdev(kls[name]) / 2, **FLOAT32)
    assert ours.l0 == statistics.mean(active)
    for name, (off, whole) in written.items():
        assert ours.delta_share[name] == pytest.approx((sum(off) / sum(whole)).item(), **FLOAT32), name
    assert len({round(value, 6) for value in ours.evidence.kl.values()}) >= 5  # corners differ here
    assert ours.evidence.worst_corner == max(ours.evidence.kl[name] for name in CORNERS)


def test_a_language_models_answers_are_kept_at_every_corner(tiny_llama_dir, tmp_path):
    recipe = model_recipe(tiny_llama_dir, "slices.delta=true", folder=tmp_path)
    subject = language_subject(recipe, CPU)
    decomposition = unsettle(start_decomposition(recipe, subject, ["layers.1.mlp.up_proj", "layers.1.mlp.down_proj"]))
    ours = evaluated(subject, decomposition, QUICK)
    evidence = ours.evidence
    assert evidence.kl["importance"] == ours.metrics["recon"] == pytest.approx(evidence.kl["corner_0"], **FLOAT32)
    assert evidence.kl["stochastic"] == ours.metrics["stochastic_recon"]
    masked = [one.masked for one in ours.answers]
    assert evidence.answers["corner_0"] == evidence.answers["importance"] == pytest.approx(masked, **FLOAT32)
    assert evidence.answers["corner_1"] != pytest.approx(masked, rel=1e-3)
    assert evidence.pgd_shared.sequences == 2
    assert evidence.pgd_shared.kl >= evidence.kl["corner_0"] * 0.999  # where one of its starts is


@pytest.fixture(scope="module")
def right_one(tmp_path_factory):
    """The evidence for a right decomposition, with everything that can be sought."""
    run = right_run(tmp_path_factory.mktemp("right"))
    return evaluated(run.subject, run.decomposition, MaskSearch("curve", 1), 8).evidence


def test_a_right_decomposition_stands_every_mask(right_one):
    evidence = right_one
    assert all(0 <= value < 1e-6 for value in evidence.kl.values())
    assert all(found.kl < 1e-6 for found in evidence.attacks.values())
    assert set(evidence.accuracy.values()) == {evidence.accuracy["corner_0"]}
    assert [(point.steps, round(point.steps * point.size, 9)) for point in evidence.pgd_curve] == [
        (5, 2), (10, 2), (20, 2), (40, 2), (80, 2), (160, 2), (320, 2)
    ]  # fmt: skip


def test_slices_that_importance_masks_hide_are_found_by_a_search(tmp_path):
    run = hide_a_pair(right_run(tmp_path))
    evaluation = evaluated(run.subject, run.decomposition, QUICK)
    evidence = evaluation.evidence
    assert evaluation.metrics["faithfulness"] < 1e-10
    assert evidence.kl["importance"] < 1e-6
    assert evidence.worst_corner < 1e-6
    assert evidence.kl["stochastic"] < 0.5 * evidence.pgd_shared.kl
    assert evidence.pgd_shared.kl > 0.5


def test_every_number_has_a_grade_and_words(right_one):
    evidence = right_one
    data = plain(evidence)
    kinds = set(data) - {"standard_error", "accuracy", "grades", "pgd_curve"}
    assert kinds == set(MASKS)
    assert set(evidence.grades) == kinds | {"pgd_curve"}
    assert set(evidence.grades.values()) == set(GRADES)
    assert [LOSSES[name].grade.label for name in ("recon", "stochastic_recon")] == [
        GRADES["importance"].label,
        GRADES["stochastic"].label,
    ]
    assert LOSSES["faithfulness"].grade is None
    shared = data["pgd_shared"]
    assert {"kl", "accuracy", "steps", "size", "starts"} <= shared.keys()
    assert (shared["steps"], shared["size"], shared["starts"]) == (20, 0.1, 1)
    assert evidence.attacks["pgd_curve_40"].allowed == (
        "40 steps of 0.05, 1 random starts and 2 corners, masks shared by all positions, delta attacked, 8 sequences"
    )


def test_no_search_is_done_unless_it_is_wanted(tmp_path):
    run = right_run(tmp_path)
    data = plain(evaluated(run.subject, run.decomposition).evidence)
    assert not [name for name in data if name.startswith("pgd")]
