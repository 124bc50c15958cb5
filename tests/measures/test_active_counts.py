"""L0 counted one slice at one position at a time."""

from __future__ import annotations

import torch
from small_runs import loud_toy, toy_recipe

from spdcli.engine.forward import clean_pass
from spdcli.measures.active_counts import active_per_position
from spdcli.measures.evaluation_data import evaluation_batches
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import toy_subject


def test_active_slices_a_position(tmp_path):
    recipe = toy_recipe("importance.gate_bias=0.1", folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe))
    decomposition = start_decomposition(recipe, subject, ["Q0", "V1"]).requires_grad_(False)
    values = []
    for batch in evaluation_batches(subject, 5, seed=3):
        for row in range(len(batch.tokens)):
            clean = clean_pass(subject.target, batch.select(torch.tensor([row])), decomposition.names)
            g, _ = decomposition.importance(clean.inputs)
            values += [[g[name][0, t].tolist() for name in g] for t in range(batch.tokens.shape[1])]
    expected = [
        sum(value > threshold for at in values for matrix in at for value in matrix) / len(values)
        for threshold in (0, 0.3)
    ]
    assert active_per_position(subject, decomposition, (0, 0.3), 5, seed=3) == expected
    assert expected[0] > expected[1] > 0
