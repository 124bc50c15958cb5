"""The target's own module answering with masked slices, against the engine and against weights put in by hand."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from door_checks import KOBE

import spdcli
from spdcli.engine.forward import clean_pass, masked_logits
from spdcli.engine.masks import importance_masks
from spdcli.engine.target import Batch


def logits_of(run, tokens):
    """Next-token logits `[B, T, N]` by the module's own forward pass."""
    answer = run.model(tokens)
    return answer if run.subject.toy is not None else answer.logits


@pytest.mark.parametrize("which", ["toy_run", "language_run"])
def test_the_active_slices_alone_answer_as_the_engine_says(which, request):
    run = request.getfixturevalue(which)
    tokens = torch.stack([run.tokens(text) for text in (["3 s 1 4 s", "1 s 2 2 s"] if which == "toy_run" else [KOBE])])
    batch = Batch.everywhere(tokens)
    clean = clean_pass(run.subject.target, batch, run.matrices)
    g, _ = run.decomposition.importance(clean.inputs)
    wanted = masked_logits(run.subject.target, run.decomposition, clean, importance_masks(g, run.decomposition.delta))
    before = logits_of(run, tokens)
    with torch.no_grad(), run.masked(active=True) as model:
        assert model is run.model
        masked = logits_of(run, tokens)
    torch.testing.assert_close(masked.flatten(0, 1), wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(masked, before, atol=1e-3)
    assert torch.equal(logits_of(run, tokens), before)  # closed, it is the target again


def test_given_masks_against_weights_put_in_by_hand(language_run):
    name = language_run.matrices[2]
    U, V = language_run.slices(name)
    matrix = language_run.subject.target.matrices[name]
    tokens, mask = language_run.tokens(KOBE)[None], torch.rand(6)
    with torch.no_grad(), language_run.masked({name: mask}, delta=0.25):
        masked = language_run.model(tokens).logits
    with in_place(matrix, (U * mask) @ V + 0.25 * (matrix.weight - U @ V)):
        wanted = language_run.model(tokens).logits
    torch.testing.assert_close(masked, wanted, atol=1e-5, rtol=1e-4)
    with torch.no_grad(), language_run.masked({name: torch.ones(tokens.shape[1], 6)}, delta=1.0):
        torch.testing.assert_close(
            language_run.model(tokens).logits, language_run.model.forward(tokens).logits, atol=1e-5, rtol=1e-4
        )


@contextmanager
def in_place(matrix, weight):
    before = matrix.weight.clone()
    with torch.no_grad():
        matrix.weight.copy_(weight)
        yield
        matrix.weight.copy_(before)


def test_padding_and_hooks_of_others(language_run):
    tokens = language_run.tokens(KOBE)[None]
    padded = torch.cat([tokens, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    real = (torch.arange(padded.shape[1]) < tokens.shape[1])[None]
    seen = []
    handle = language_run.model.transformer.h[1].register_forward_hook(lambda *hook: seen.append(hook[2]))
    with torch.no_grad(), language_run.masked(active=True):
        alone = language_run.model(input_ids=tokens).logits
        beside = language_run.model(input_ids=padded, attention_mask=real.long()).logits
    handle.remove()
    assert seen
    torch.testing.assert_close(beside[:, : tokens.shape[1]], alone, atol=1e-5, rtol=1e-4)


def test_what_a_masked_model_cannot_be_called_with(language_run):
    tokens = language_run.tokens(KOBE)[None]
    name = language_run.matrices[0]
    with pytest.raises(spdcli.UsageError, match="active=True"), language_run.masked():
        pass
    with torch.no_grad():
        cache = language_run.model(tokens, use_cache=True).past_key_values
        for call, said in (
            (lambda: language_run.model(torch.zeros(1, 2, 32)), "token ids"),
            (lambda: language_run.model(tokens, past_key_values=cache), "cached"),
            (
                lambda: language_run.model(tokens, attention_mask=torch.tensor([[0] + [1] * (tokens.shape[1] - 1)])),
                "end",
            ),
        ):
            with language_run.masked(active=True), pytest.raises(spdcli.UsageError, match=said):
                call()
        for masks in ({}, [name], torch.ones(6)):
            with pytest.raises(spdcli.UsageError, match="names no matrix"), language_run.masked(masks):
                pass
        with pytest.raises(spdcli.UsageError, match="no number"), language_run.masked(active=True, delta="1"):
            pass
        for masks, said in (
            ({"nowhere": torch.ones(6)}, "nowhere"),
            ({name: torch.ones(5)}, "shape"),
            ({name: 1.0}, "no tensor"),
            ({name: torch.tensor(1.0)}, "no tensor"),
        ):
            with language_run.masked(masks), pytest.raises(spdcli.UsageError, match=said):
                language_run.model(tokens)
    assert torch.isfinite(language_run.model(tokens).logits).all()  # every one of them was closed again
