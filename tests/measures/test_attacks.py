"""The search for bad masks, against one that goes sequence by sequence and position by position."""

from __future__ import annotations

import pytest
import torch
from slow_evaluation import FLOAT32, TOY, unsettle
from slow_toy import slow_toy
from small_runs import loud_toy, toy_recipe

from spdcli.engine.forward import clean_pass
from spdcli.measures.answers import answer_rows
from spdcli.measures.attacks import Budget, attack
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import toy_subject
from spdcli.targets.sequences import InductionSequences

NAMES = ["Q0", "V0", "K1", "V1"]
STEPS, SIZE = 2, 0.3


@pytest.fixture
def toy(tmp_path):
    recipe = toy_recipe(*TOY, folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe, seed=1))
    decomposition = unsettle(start_decomposition(recipe, subject, NAMES))
    clean = clean_pass(subject.target, InductionSequences(6, 4).draw(3, torch.Generator().manual_seed(2)), NAMES)
    with torch.no_grad():
        g, _ = decomposition.importance(clean.inputs)
    return subject, decomposition, clean, g


def found(toy, *budget, seed=0, **settings):
    subject, decomposition, clean, g = toy
    rows = answer_rows(subject, clean.batch)
    return attack(subject.target, decomposition, clean, g, rows, Budget(*budget, **settings), seed)


def slow_search(toy, start, delta, shared):
    """From the corner `start`: the largest mean KL on the way, and whether each answer is right in the end."""
    subject, decomposition, clean, g = toy
    sequences, length = clean.batch.tokens.shape
    weights = {name: matrix.weight for name, matrix in subject.target.matrices.items()}
    places = (1, 1) if shared else (sequences, length)
    r = {name: torch.full((*places, 3), start) for name in NAMES}
    d = {name: torch.full(places, start if delta else 0.0) for name in NAMES}
    moving = [*r.values(), *(d.values() if delta else ())]

    def log_probs(row):
        at = lambda t: (0, 0) if shared else (row, t)  # noqa: E731

        def weight_at(name, t):
            if name not in NAMES:
                return weights[name]
            own, mask = decomposition.of(name), g[name][row, t] + (1 - g[name][row, t]) * r[name][at(t)]
            U, V = own.U.detach(), own.V.detach()
            return U @ torch.diag(mask) @ V + d[name][at(t)] * (weights[name] - U @ V)

        return slow_toy(subject.toy, clean.batch.tokens[row], weight_at)[0]

    largest = 0.0
    for step in range(STEPS + 1):
        for tensor in moving:
            tensor.requires_grad_()
        kls = [(clean.log_probs[i].exp() * (clean.log_probs[i] - log_probs(i))).sum() for i in range(sequences)]
        mean = torch.stack(kls).mean()
        largest = max(largest, mean.item())
        if step < STEPS:
            for tensor, slope in zip(moving, torch.autograd.grad(mean, moving), strict=True):
                with torch.no_grad():
                    tensor.add_(slope.sign(), alpha=SIZE).clamp_(0, 1)
    right = [int(log_probs(i).argmax()) == int(clean.batch.answers[i]) for i in range(sequences)]
    return largest, sum(right) / sequences


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("delta", [True, False])
def test_the_search_is_that_of_a_slow_one(toy, delta, shared):
    ours = found(toy, STEPS, SIZE, 0, delta=delta, shared=shared)
    corners = [0.0, 1.0] if not delta else [0.0]  # all on with the whole delta is the target: no slope, no direction
    slow = [slow_search(toy, corner, delta, shared) for corner in corners]
    assert ours.kl_by_start[: len(corners)] == pytest.approx([kl for kl, _ in slow], **FLOAT32)
    assert ours.kl == max(ours.kl_by_start)
    assert ours.accuracy <= min(right for _, right in slow)
    assert slow[0][0] > 1.1 * slow_search_start(toy)  # it goes somewhere


def slow_search_start(toy):
    """The KL of importance masks, where the first corner starts."""
    return found(toy, 0, SIZE, 0).kl_by_start[0]


def test_more_steps_a_finer_plan_and_free_masks_find_no_less(toy):
    subject, decomposition, clean, g = toy
    one = found(toy, 4, 0.2, 3)
    rows = answer_rows(subject, clean.batch)
    in_parts = attack(subject.target, decomposition, clean, g, rows, Budget(4, 0.2, 3), 0, memory=1)
    assert one.kl_by_start[:4] == pytest.approx(in_parts.kl_by_start[:4], **FLOAT32)  # the last begins at the target
    assert len(one.kl_by_start) == one.starts + 2
    assert one == found(toy, 4, 0.2, 3)
    assert one.kl_by_start[:3] != found(toy, 4, 0.2, 3, seed=1).kl_by_start[:3]
    assert found(toy, 8, 0.2, 3).kl >= one.kl  # the first four steps are the same
    assert found(toy, 8, 0.2, 0, shared=False).kl > found(toy, 8, 0.2, 0).kl


def test_slices_get_no_gradient_and_keep_asking_for_one(toy):
    found(toy, 1, 0.5, 1)
    parameters = list(toy[1].parameters())
    assert all(parameter.grad is None for parameter in parameters)
    assert toy[1].of("V1").U.requires_grad
    assert toy[1].delta is False  # although W - U V was attacked
